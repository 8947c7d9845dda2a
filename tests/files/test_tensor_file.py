from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lragent.files.tensor_file import write_tensors


def test_everyone_may_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors({"w": torch.arange(3.0)}, path, {"format": "pt"})
    assert path.stat().st_mode & 0o777 == 0o644
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert opened.get_tensor("w").tolist() == [0.0, 1.0, 2.0]


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.safetensors"):
        write_tensors({"w": torch.arange(3.0)}, tmp_path / "missing" / "a.safetensors", None)
