"""The Triton kernels as machine code of GPUs that aren't there, in a process of their own that doesn't interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from lragent.kernels import triton_library

ROOT = Path(__file__).parents[2]
# What compilers make of a kernel differs from version to version: this is the one of the extra `gpu`.
VERSION = "3.7.1"

pytestmark = pytest.mark.skipif(
    not triton_library.is_installed() or version("triton") != VERSION, reason=f"triton {VERSION} isn't installed"
)


@pytest.mark.parametrize(
    "marked", [pytest.param("not slow", marks=pytest.mark.integration), pytest.param("slow", marks=pytest.mark.slow)]
)
def test_variants_fit_their_targets(marked: str) -> None:
    file = Path(__file__).parent / "compiled" / "check_compiled.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
