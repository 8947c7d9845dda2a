import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lragent.errors import TaskFileError
from lragent.rollouts.jsonl import ResultFile, check_tasks, finished_ids, pending_tasks, read_results, read_tasks


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return tmp_path / "tasks.jsonl"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_tasks_are_read_lazily(tasks: Path) -> None:
    write(tasks, '{"id": "a"}\nthis is no task\n')
    assert next(read_tasks(tasks)) == {"id": "a"}


def test_blank_lines_and_a_missing_last_newline_are_fine(tasks: Path) -> None:
    write(tasks, '\ufeff{"id": "a"}\n\n  \n{"id": 2, "q": "\u00fc"}')
    assert list(read_tasks(tasks)) == [{"id": "a"}, {"id": 2, "q": "\u00fc"}]


def test_a_task_without_id_gets_its_line_number(tasks: Path) -> None:
    write(tasks, '{"q": 1}\n\n{"q": 2}\n')
    assert [task["id"] for task in read_tasks(tasks)] == [1, 3]
    assert check_tasks(tasks) == [1, 3]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"id": "b",}', "not JSON"),
        (b'{"id": "b"', "not JSON"),
        (b"[1, 2]", r"not a JSON object but \[1, 2\]"),
        (b'"id"', "not a JSON object"),
        (b'{"id": "\xff"}', "not UTF-8 .byte 0xff at column 9"),
        (b'{"id": 1.5}', '"id" is 1.5'),
        (b'{"id": true}', '"id" is true'),
        (b'{"id": null}', '"id" is null'),
        (b"x" * 500, r"x{57}\.\.\.$"),
        (b'{"a": ' + b"[" * 100_000, "not JSON .maximum recursion depth"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON .Exceeds the limit"),
    ],
    ids=[
        "comma",
        "cut off",
        "list",
        "string",
        "bytes",
        "float id",
        "bool id",
        "null id",
        "long line",
        "deep",
        "digits",
    ],
)
def test_an_unreadable_line_is_named_with_what_was_found(tasks: Path, line: bytes, found: str) -> None:
    write(tasks, b'{"id": "a"}\n' + line + b'\n{"id": "c"}\n')
    with pytest.raises(TaskFileError) as raised:
        check_tasks(tasks)
    assert raised.value.message.startswith(f"{tasks} line 2: ")
    assert re.search(found, raised.value.message)
    assert raised.value.hint


def test_two_tasks_with_one_id_are_refused(tasks: Path) -> None:
    write(tasks, '{"id": "a"}\n{"id": "b"}\n{"id": "a"}\n')
    with pytest.raises(TaskFileError, match='lines 1 and 3 have the same id "a"'):
        check_tasks(tasks)


def test_an_id_may_not_equal_the_line_number_that_another_task_got(tasks: Path) -> None:
    write(tasks, '{"q": 1}\n{"id": 1}\n')
    with pytest.raises(TaskFileError, match="lines 1 and 2 have the same id 1"):
        check_tasks(tasks)


def test_a_number_and_its_text_are_two_ids(tasks: Path) -> None:
    write(tasks, '{"id": 1}\n{"id": "1"}\n')
    assert check_tasks(tasks) == [1, "1"]


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_tasks_is_refused(tasks: Path, text: str) -> None:
    with pytest.raises(TaskFileError, match="has no task"):
        check_tasks(write(tasks, text))


def test_a_missing_file_is_named(tasks: Path) -> None:
    with pytest.raises(TaskFileError, match=r"tasks.jsonl can't be read: No such file"):
        check_tasks(tasks)


def test_results_are_on_disk_at_once(results: Path) -> None:
    with ResultFile(results) as out:
        out.write({"id": "a", "text": "\u00fc\n"})
        assert list(read_results(results)) == [{"id": "a", "text": "\u00fc\n"}]
        assert results.read_bytes().count(b"\n") == 1


def test_an_existing_file_is_refused_and_left_alone(results: Path) -> None:
    write(results, '{"id": "a"}\n')
    with pytest.raises(TaskFileError) as raised:
        finished_ids(results, "refuse")
    assert "exists" in raised.value.message
    assert "--resume" in raised.value.hint and "--overwrite" in raised.value.hint
    with pytest.raises(TaskFileError, match="can't be written: File exists"):
        ResultFile(results)
    assert results.read_text() == '{"id": "a"}\n'


def test_overwrite_starts_anew(results: Path) -> None:
    write(results, '{"id": "a"}\n')
    assert finished_ids(results, "overwrite") == set()
    with ResultFile(results, "overwrite") as out:
        out.write({"id": "b"})
    assert list(read_results(results)) == [{"id": "b"}]


def test_resume_without_a_file_starts_one(results: Path) -> None:
    assert finished_ids(results, "resume") == set()
    with ResultFile(results, "resume") as out:
        out.write({"id": "a"})
    assert list(read_results(results)) == [{"id": "a"}]


@pytest.mark.parametrize("torn", ["", '{"id": "c", "tok', '{"id": "c"}', "x" * 200_000], ids=len)
def test_resume_drops_a_torn_last_line_and_skips_finished_tasks(tasks: Path, results: Path, torn: str) -> None:
    write(tasks, '{"id": "a"}\n{"id": 2}\n{"id": "c"}\n{"id": "d"}\n')
    write(results, '{"id": 2}\n{"id": "a"}\n' + torn)
    assert [result["id"] for result in read_results(results)] == [2, "a"]
    finished = finished_ids(results, "resume")
    assert finished == {"a", 2}
    with ResultFile(results, "resume") as out:
        for task in pending_tasks(tasks, finished):
            out.write({"id": task["id"]})
    assert [result["id"] for result in read_results(results)] == [2, "a", "c", "d"]


def test_a_file_with_nothing_but_a_torn_line_is_emptied(results: Path) -> None:
    write(results, '{"id": "a", "tok')
    assert finished_ids(results, "resume") == set()
    ResultFile(results, "resume").__exit__(None, None, None)
    assert results.read_bytes() == b""


def test_resume_refuses_a_file_that_holds_something_else(results: Path) -> None:
    write(results, '{"id": "a"}\nnotes of mine\n')
    with pytest.raises(TaskFileError, match="line 2: not JSON"):
        finished_ids(results, "resume")
    assert results.read_text().endswith("notes of mine\n")


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match="can't be written: No such file or directory"):
        ResultFile(tmp_path / "nowhere" / "results.jsonl")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(cut=st.integers(min_value=0, max_value=10_000), count=st.integers(min_value=1, max_value=20))
def test_a_file_cut_anywhere_is_completed_by_resume(tmp_path: Path, cut: int, count: int) -> None:
    tasks = write(tmp_path / "tasks.jsonl", "".join(json.dumps({"id": f"t{i}"}) + "\n" for i in range(count)))
    lines = [json.dumps({"id": f"t{i}", "result": "\u00fc" * i}, ensure_ascii=False) + "\n" for i in range(count)]
    whole = "".join(lines).encode()
    results = write(tmp_path / "results.jsonl", whole[: min(cut, len(whole))])
    finished = finished_ids(results, "resume")
    with ResultFile(results, "resume") as out:
        for task in pending_tasks(tasks, finished):
            out.write({"id": task["id"], "result": "\u00fc" * int(task["id"][1:])})
    assert results.read_bytes() == whole


def test_a_killed_process_loses_nothing_that_was_written(results: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from lragent.rollouts.jsonl import ResultFile\n"
        "out = ResultFile(Path(sys.argv[1]))\n"
        "out.write({'id': 'a'}); out.write({'id': 'b'}); print('written', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(results)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [result["id"] for result in read_results(results)] == ["a", "b"]


def test_a_pipe_is_refused_as_it_can_be_read_once_only(tmp_path: Path) -> None:
    pipe = tmp_path / "tasks"
    os.mkfifo(pipe)
    with pytest.raises(TaskFileError, match="is no regular file"):
        check_tasks(pipe)


def test_resume_passes_over_lines_that_are_no_results(results: Path) -> None:
    write(results, '{"id": [1]}\n{"note": "mine"}\n{"id": null}\n{"id": 2}\n')
    assert finished_ids(results, "resume") == {2}


def test_a_file_that_another_run_writes_is_left_alone(results: Path) -> None:
    with ResultFile(results) as first:
        first.write({"id": "a"})
        with results.open("ab") as torn:
            torn.write(b'{"id": "b", "tok')  # the first run is in the middle of a line
        for existing in ("resume", "overwrite"):
            with pytest.raises(TaskFileError, match="another run is writing"):
                ResultFile(results, existing)  # type: ignore[arg-type]
    assert results.read_bytes().endswith(b'{"id": "b", "tok')
    with ResultFile(results, "resume") as second:
        assert second.finished == {"a"}


def test_a_full_disk_keeps_whole_lines(results: Path) -> None:
    """A limit of the file's size stands for the disk: the line that passes it is written in part."""
    program = (
        "import sys, resource, signal; from pathlib import Path; from lragent.rollouts.jsonl import ResultFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with ResultFile(Path(sys.argv[1])) as out:\n"
        "    [out.write({'id': i, 'text': 'x' * 280}) for i in range(9)]\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(results)], capture_output=True, text=True, check=False)
    assert "can't be written: File too large" in run.stderr and "--resume" in run.stderr
    assert results.stat().st_size == 1000
    assert finished_ids(results, "resume") == {0, 1, 2}
