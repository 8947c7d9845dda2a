import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lragent.errors import TaskFileError
from lragent.rollouts.kept_results import read_results
from tests.rollouts.results import RUN, line, opened, places, run_file, run_with, written

A, B, C, D = ({"id": name} for name in "abcd")
TASKS = places(A, B, C, D)

WRITER = """
import sys, time
from pathlib import Path
from tests.rollouts.results import line, opened
with opened(Path(sys.argv[1])) as out:
    out.write(line({"id": "a"}))
    out.write(line({"id": "b"}))
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def ids(path: Path) -> list[str]:
    return [result["id"] for result in read_results(path)]


def test_results_are_on_disk_at_once_and_the_run_file_before_them(results: Path) -> None:
    with opened(results) as out:
        assert results.read_bytes() == b""
        assert [entry["run"] for entry in run_file(results)["runs"]] == [RUN.digest]
        out.write({**line(A), "text": "\u00fc\n"})
        assert [result["text"] for result in read_results(results)] == ["\u00fc\n"]
        assert results.read_bytes().count(b"\n") == 1
    assert sorted(path.name for path in results.parent.iterdir()) == ["results.jsonl", "results.jsonl.run.json"]


def test_an_existing_file_is_refused_and_left_alone(results: Path) -> None:
    results.write_text("notes of mine\n")
    with pytest.raises(TaskFileError) as raised, opened(results):
        pass
    assert "exists" in raised.value.message
    assert "--resume" in raised.value.hint and "--overwrite" in raised.value.hint
    assert results.read_text() == "notes of mine\n"


def test_overwrite_starts_anew(results: Path) -> None:
    written(results, line(A))
    other = run_with(seed=1)
    with opened(results, "overwrite", other) as out:
        out.write(line(B, other))
    assert ids(results) == ["b"]
    assert [entry["run"] for entry in run_file(results)["runs"]] == [other.digest]


@pytest.mark.parametrize("before", [None, "", "\n"], ids=["no file", "empty", "blank"])
def test_resume_without_results_starts_a_file(results: Path, before: str | None) -> None:
    if before is not None:
        results.write_text(before)
    with opened(results, "resume") as out:
        out.write(line(A))
    assert ids(results) == ["a"]


@pytest.mark.parametrize("torn", ["", '{"id": "c", "tok', '{"id": "c"}', "\0" * 300, "x" * 200_000], ids=len)
def test_resume_drops_a_torn_last_line(results: Path, torn: str) -> None:
    written(results, line(B), line(A))
    with results.open("a") as file:
        file.write(torn)
    assert ids(results) == ["b", "a"]
    with opened(results, "resume", tasks=TASKS) as out:
        assert out.kept.finished == {("a", 0), ("b", 0)}
        out.write(line(C))
    assert ids(results) == ["b", "a", "c"]


def test_resume_refuses_a_file_that_holds_something_else(results: Path) -> None:
    written(results, line(A))
    with results.open("a") as file:
        file.write("notes of mine\n")
    with pytest.raises(TaskFileError, match="line 2: not JSON"), opened(results, "resume"):
        pass
    assert results.read_text().endswith("notes of mine\n")


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(TaskFileError, match="can't be written: No such file or directory"),
        opened(tmp_path / "nowhere" / "results.jsonl"),
    ):
        pass
    with pytest.raises(TaskFileError, match="can't be written: Is a directory"), opened(tmp_path, "overwrite"):
        pass


def test_an_error_while_the_file_is_open_is_not_the_files(results: Path) -> None:
    with pytest.raises(ConnectionError, match="search"), opened(results):
        raise ConnectionError("search is down")
    with opened(results, "resume"):  # the lock is free
        pass


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(cut=st.integers(min_value=0, max_value=4000), count=st.integers(min_value=1, max_value=12))
def test_a_file_cut_anywhere_is_completed_by_resume(results: Path, cut: int, count: int) -> None:
    tasks = [{"id": f"t{i}", "q": "\u00fc" * i} for i in range(count)]
    results.unlink(missing_ok=True)
    written(results, *map(line, tasks))
    whole = results.read_bytes()
    results.write_bytes(whole[:cut])
    with opened(results, "resume", tasks=places(*tasks)) as out:
        for task in tasks:
            if (task["id"], 0) not in out.kept.finished:
                out.write(line(task))
    assert results.read_bytes() == whole


def start_writer(results: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(results)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_gone_and_a_kill_loses_nothing(results: Path) -> None:
    with start_writer(results) as process:
        with results.open("ab") as torn:
            torn.write(b'{"id": "c", "tok')  # the first run is in the middle of a line
        for existing in ("resume", "retry", "overwrite"):
            with pytest.raises(TaskFileError, match="another run is writing"), opened(results, existing):  # type: ignore[arg-type]
                pass
        assert results.read_bytes().endswith(b'{"id": "c", "tok')
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with opened(results, "resume", tasks=TASKS) as second:
        assert second.kept.finished == {("a", 0), ("b", 0)}
    assert ids(results) == ["a", "b"]


def test_a_retry_removes_failed_lines_and_keeps_the_others_as_they_are(results: Path) -> None:
    odd = "  " + json.dumps(line(A), separators=(",", ":"))
    written(results, line(B, error="KeyError"), line(C), line(D, error="KeyError", attempt=3))
    with results.open("a") as file:
        file.write(f'\n{odd}\n{{"note": "mine"}}\n{{"id": "torn')
    results.chmod(0o640)
    with opened(results, "retry", tasks=TASKS) as out:
        assert out.kept.finished == {("c", 0), ("a", 0)}
        assert out.kept.run_file.attempts == {("b", 0): 1, ("d", 0): 3}
    assert results.read_text().splitlines()[0] == json.dumps(line(C))
    assert results.read_text().endswith(f'\n{odd}\n{{"note": "mine"}}\n')
    assert results.stat().st_mode & 0o777 == 0o640
    # A retry that is killed before the tasks ran: their attempts are still known.
    with opened(results, "resume", tasks=TASKS) as out:
        assert out.kept.run_file.attempts == {("b", 0): 1, ("d", 0): 3}


def test_a_link_to_a_file_stays_one(results: Path, tmp_path: Path) -> None:
    written(results, line(A, error="KeyError"), line(B))
    link = tmp_path / "link.jsonl"
    link.symlink_to(results)
    with opened(link, "retry", tasks=TASKS):
        pass
    assert link.is_symlink() and ids(results) == ["b"]


def test_a_pipe_takes_lines_and_no_run_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with opened(pipe, "overwrite") as out:
        out.write({"id": "a"})
    assert os.read(reader, 100) == b'{"id": "a"}\n'
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_full_disk_keeps_whole_lines(results: Path) -> None:
    """A limit of the file's size stands for the disk: the line that passes it is written in part."""
    program = (
        "import sys, resource, signal; from pathlib import Path; from tests.rollouts.results import line, opened\n"
        "with opened(Path(sys.argv[1])) as out:\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "    [out.write(line({'id': i}, text='x' * 150)) for i in range(9)]\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(results)], capture_output=True, text=True, check=False)
    assert "can't be written: File too large" in run.stderr and "--resume" in run.stderr
    assert results.stat().st_size == 1000
    assert len(ids(results)) == results.read_bytes().count(b"\n") > 1
