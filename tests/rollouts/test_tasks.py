import os
import re
from pathlib import Path

import pytest

from lragent.errors import TaskFileError
from lragent.rollouts.tasks import TaskPlace, check_tasks, read_tasks, task_digest


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return tmp_path / "tasks.jsonl"


def test_tasks_are_read_lazily(tasks: Path) -> None:
    write(tasks, '{"id": "a"}\nthis is no task\n')
    assert next(read_tasks(tasks))[1] == {"id": "a"}


def test_blank_lines_and_a_missing_last_newline_are_fine(tasks: Path) -> None:
    write(tasks, '\ufeff{"id": "a"}\n\n  \n{"id": 2, "q": "\u00fc"}')
    assert [task for _, task in read_tasks(tasks)] == [{"id": "a"}, {"id": 2, "q": "\u00fc"}]


def test_a_task_without_id_gets_its_line_number(tasks: Path) -> None:
    write(tasks, '{"q": 1}\n\n{"q": 2}\n')
    assert [task["id"] for _, task in read_tasks(tasks)] == [1, 3]
    assert list(check_tasks(tasks)) == [1, 3]
    digest = task_digest({"q": 2})
    assert check_tasks(tasks)[3] == TaskPlace(id=3, index=1, line=3, named=False, digest=digest)


def test_a_digest_is_of_the_content_and_not_of_its_order() -> None:
    assert task_digest({"id": "a", "q": [1, {"x": 2, "y": None}]}) == task_digest(
        {"q": [1, {"y": None, "x": 2}], "id": "a"}
    )
    assert len({task_digest(task) for task in ({"q": 1}, {"q": 2}, {"q": 1, "id": 1}, {"q": "1"}, {})}) == 5


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
    assert list(check_tasks(tasks)) == [1, "1"]


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_tasks_is_refused(tasks: Path, text: str) -> None:
    with pytest.raises(TaskFileError, match="has no task"):
        check_tasks(write(tasks, text))


def test_a_missing_file_is_named(tasks: Path) -> None:
    with pytest.raises(TaskFileError, match=r"tasks.jsonl can't be read: No such file"):
        check_tasks(tasks)


def test_a_pipe_is_refused_as_it_can_be_read_once_only(tmp_path: Path) -> None:
    pipe = tmp_path / "tasks"
    os.mkfifo(pipe)
    with pytest.raises(TaskFileError, match="is no regular file"):
        check_tasks(pipe)
