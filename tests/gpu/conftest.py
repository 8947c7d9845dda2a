"""Everything here needs a CUDA or HIP device and Triton, and says so where there is none."""

from __future__ import annotations

import pytest
import torch

from lragent.kernels import triton_library


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or HIP device")
    if not triton_library.is_installed():
        pytest.skip("triton isn't installed: pip install 'lragent[gpu]'")
    torch.backends.cuda.matmul.allow_tf32 = False
    triton_library.load()
