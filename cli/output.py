"""Output of the commands: results go to stdout, progress goes to stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

PLAIN_WIDTH = 120  # columns of tables in a file or a pipe

results = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
progress = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Prints one JSON object on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False))


@contextmanager
def stages(title: str) -> Iterator[Callable[[str], None]]:
    """Shows the running stage; yields a function that is called with the name of each stage when it begins.

    Progress bars of transformers, and warnings of libraries that don't concern the user, are hidden until the end.
    """
    with quiet_libraries():
        if progress.is_terminal:
            with progress.status(title) as status:
                yield lambda stage: status.update(f"{title}: {stage}")
        else:
            yield lambda stage: progress.print(f"{title}: {stage}", markup=False)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides progress bars of transformers and deprecation warnings of libraries; restores both at the end."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|peft)\.")
            yield
    finally:
        if drawn:
            logging.enable_progress_bar()
