"""The Triton kernels without a GPU, in a process of their own: Triton reads at import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lragent.kernels import triton_library

pytestmark = pytest.mark.skipif(not triton_library.is_installed(), reason="triton isn't installed")

LONG = "check_attention.py"  # takes over a minute
CHECKS = [
    pytest.param(file, id=file.stem, marks=[pytest.mark.integration] if file.name == LONG else [])
    for file in sorted((Path(__file__).parent / "interpreter").glob("check_*.py"))
]
ROOT = Path(__file__).parents[2]


def _run(file: Path, marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", CHECKS)
def test_checks_pass_in_the_interpreter(file: Path) -> None:
    _run(file, "not slow")


@pytest.mark.slow
def test_long_checks_pass_in_the_interpreter() -> None:
    _run(Path(__file__).parent / "interpreter" / LONG, "slow")
