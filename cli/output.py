"""Where output goes: results to stdout, progress to stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

PLAIN_WIDTH = 120  # of tables that go to a file or a pipe

results = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
progress = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on one line, for machines."""
    typer.echo(json.dumps(value, ensure_ascii=False))


@contextmanager
def stages(title: str) -> Iterator[Callable[[str], None]]:
    """Shows the stage that is running; yields what to call when the next one begins.

    Meanwhile transformers draws no bars of its own, and libraries' notes on what they will deprecate are left out.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|peft)\.")
        if progress.is_terminal:
            with progress.status(title) as status:
                yield lambda stage: status.update(f"{title}: {stage}")
        else:
            yield lambda stage: progress.print(f"{title}: {stage}", markup=False)
