"""A lock that a file stands for is held by one process at a time, also while its file is removed and made again."""

import subprocess
import sys
from pathlib import Path

from lragent.files.locks import file_lock

COUNT = """
import sys, time
from pathlib import Path
from lragent.files.locks import file_lock
lock, counter = Path(sys.argv[1]), Path(sys.argv[2])
done = 0
while done < 60:
    with file_lock(lock) as held:
        if held:
            value = int(counter.read_text())
            counter.write_text(str(value + 1))
            done += 1
"""


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "results.lock"
    with file_lock(path) as first, file_lock(path) as second:
        assert (first, second) == (True, False)
        assert path.exists()
    assert not path.exists()
    with file_lock(path) as again:
        assert again


def test_processes_that_take_turns_lose_no_count(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "lock"), str(counter)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert counter.read_text() == "180"
