"""The demo's model and artifact. They are made in the first run and kept for later runs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lragent

from .convert import print_report
from .demo_model import write_model
from .output import progress, stages

AGENTS = ("plan", "action", "reflect")
CODE = (".py", ".cpp", ".h")


def ensure_model(directory: Path) -> Path:
    """The base model's directory; it is written if it doesn't exist."""
    if not directory.is_dir():
        with stages("reading the model"):
            write_model(directory)
        progress.print(f"wrote the model to {directory}", markup=False)
    return directory


def ensure_artifact(model: Path, adapters: Path, artifact: Path, compiled: bool) -> Path:
    """The demo's artifact with both layouts; it is converted unless one with the same `ingredients` exists."""
    digest = ingredients(model, adapters)
    stamp = artifact.with_suffix(".ingredients")
    if artifact.is_dir() and stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        progress.print(f"using {artifact} from an earlier run", markup=False)
        return artifact
    with stages("converting, once") as show:
        report = lragent.convert(
            model,
            {agent: adapters / agent for agent in AGENTS},
            artifact,
            dtype="float32",
            layouts=("split", "dense"),
            overwrite=True,
            compiled=compiled,
            progress=show,
        )
    stamp.write_text(digest, encoding="utf-8")
    print_report(report, progress)
    return artifact


def ingredients(model: Path, adapters: Path) -> str:
    """A hash of adapters, names and sizes of the model's files, and the code that writes artifacts."""
    digest = hashlib.sha256()
    package = Path(lragent.__file__).parent
    code = (file for file in package.rglob("*") if file.suffix in CODE and not file.is_relative_to(package / "runtime"))
    for file in (*sorted(code), *sorted(adapters.glob("*/adapter_*"))):
        digest.update(f"{file.name} ".encode())
        digest.update(file.read_bytes())
    for file in sorted(model.iterdir()):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
    return digest.hexdigest()
