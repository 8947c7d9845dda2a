"""CompiledKey: text, paths and units of compiled files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lragent.artifact.compiled_files import CompiledKey, place_compiled, unit_of
from lragent.compile.segments.plan import SegmentPlan, write_plan
from lragent.errors import ArtifactError
from lragent.files.checked_file import describe_file
from lragent.kernels.dispatch import IMPLEMENTATIONS, graphs
from lragent.program.dtypes import DTYPES, LAYOUTS

KEY = CompiledKey("split", "inductor_decode", torch.bfloat16)


def test_text_and_back() -> None:
    assert str(KEY) == "split-inductor_decode-bfloat16"
    names = {name for attention in IMPLEMENTATIONS for name in graphs(attention)}
    keys = [CompiledKey(layout, name, dtype) for layout in LAYOUTS for name in names for dtype in DTYPES.values()]
    assert [CompiledKey.parse(str(key)) for key in keys] == keys
    assert len({str(key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    "text", ["", "split", "split-torch", "wide-torch-float32", "split--float32", "split-torch-int3"]
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="does not name a compiled program"):
        CompiledKey.parse(text)


def test_a_package_and_a_plan_have_their_own_places(tmp_path: Path) -> None:
    built, directory = tmp_path / "built", tmp_path / "artifact"
    built.mkdir()
    (built / "program.pt2").write_bytes(b"package")
    package = place_compiled(built / "program.pt2", directory, "cpu", KEY)
    assert package.path == f"compiled/cpu/{KEY}.pt2" and unit_of(package) == "model"
    plan = write_plan(SegmentPlan((describe_file(built, "program.pt2"),), (), "value:x"), built)
    entry = place_compiled(plan, directory, "cpu", KEY)
    folder = Path(entry.path).parent
    assert folder.name.startswith(f"{KEY}-") and unit_of(entry) == "layer"
    assert (directory / folder / "program.pt2").read_bytes() == b"package"
