"""Threads stay awake between the parallel regions of a step, whatever OMP_WAIT_POLICY says; a number given wins."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("imports", "given", "found"),
    [("lragent, torch", None, "30000"), ("torch, lragent", None, "None"), ("lragent, torch", "7", "7")],
)
def test_spin_count(imports: str, given: str | None, found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if given is not None:
        environment["GOMP_SPINCOUNT"] = given
    program = f"import os, {imports}; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
