"""A directory takes another one's place: nobody ever finds neither."""

import threading
from pathlib import Path

import pytest

from lragent.files import replace_directory
from lragent.files.replace_directory import put_in_place


def make(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize("exchanging", [True, False])
def test_the_new_one_is_there_and_the_old_one_gone(
    tmp_path: Path, exchanging: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanging:  # a system that can't
        monkeypatch.setattr(replace_directory, "_exchange", lambda one, other: False)
    out = tmp_path / "out"
    put_in_place(make(tmp_path / "first", "1"), out)
    put_in_place(make(tmp_path / "second", "2"), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "2"


def test_the_name_is_never_free(tmp_path: Path) -> None:
    out, done, missed = make(tmp_path / "out", "0"), threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            if not out.is_dir():
                missed.append(out)

    if not replace_directory._exchange(make(tmp_path / "a", "a"), out):
        pytest.skip("this system can't exchange names")
    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(200):
        put_in_place(make(tmp_path / "next", str(number)), out)
    done.set()
    watcher.join()
    assert not missed
