"""The folder of a tuning run: adapters by agent and the report; while it runs, its work in `.tuning/`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lragent.errors import RequestError, TuneError
from lragent.files.locks import directory_lock
from lragent.files.user_path import user_path
from lragent.tuning.adapter_directory import UNFINISHED
from lragent.tuning.report import REPORT

Existing = Literal["refuse", "resume", "overwrite"]
WORK = ".tuning"


@dataclass(frozen=True)
class TuneFolder:
    """Paths of a run."""

    out: Path

    @property
    def work(self) -> Path:
        return self.out / WORK

    @property
    def parents(self) -> Path:
        """Adapters with added modules, if there are any."""
        return self.work / "parents"

    def checkpoint(self, number: int) -> Path:
        return self.work / f"round-{number}.safetensors"

    def adapters(self, number: int) -> Path:
        """Tuned adapters of a round that is followed by another one."""
        return self.work / f"round-{number}"

    def artifact(self, number: int) -> Path:
        """The artifact that rolls out a round's trajectories."""
        return self.work / f"round-{number}.lragent"

    def results(self, number: int) -> Path:
        """Trajectories of a round after the first."""
        return self.work / f"round-{number}.jsonl"


def _clear(folder: TuneFolder) -> None:
    """Removes what a run left. Its work goes last, so that a folder which was cleared in part is still one of a run."""
    for entry in sorted(folder.out.iterdir(), key=lambda entry: entry == folder.work):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextmanager
def open_folder(out: Path, existing: Existing, parents: Mapping[str, str | Path]) -> Iterator[TuneFolder]:
    """Makes or opens the folder and locks it.

    Args:
        existing: treatment of a folder of an earlier run: "refuse" raises, "resume" goes on with it, "overwrite"
            removes it.
        parents: adapter directories, which must not lie in the folder, or hub ids.

    Raises:
        RequestError: `existing` is none of its words.
        TuneError: the folder is of something else, or in use, or can't be written.
    """
    if existing not in get_args(Existing):
        raise RequestError(f"existing is {existing!r}", f"Use one of {', '.join(get_args(Existing))}.")
    folder = TuneFolder(out)
    for agent, parent in parents.items():
        path = user_path(parent)
        if path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise TuneError(f"adapter {agent} lies in {out}, which will hold the tuned ones", "Choose another --out.")
    used = any(out.iterdir()) if out.is_dir() else out.exists()
    if used and not (folder.work.is_dir() or (out / REPORT).is_file()):
        raise TuneError(f"{out} exists and is not of a tuning run", "Choose another --out.")
    if used and existing == "refuse":
        raise TuneError(f"{out} exists", "Go on with it (--resume), or replace it (--overwrite).")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with directory_lock(out, wait=False) as alone:
            if not alone:
                raise TuneError(f"another run is tuning into {out}", "Wait for it, or choose another --out.")
            for left in out.glob(f".*{UNFINISHED}*"):
                shutil.rmtree(left)
            if existing == "overwrite":
                _clear(folder)
            folder.work.mkdir(exist_ok=True)
            yield folder
    except OSError as error:
        raise TuneError(f"{out} can't be written: {error.strerror}", "Choose another --out.") from error
