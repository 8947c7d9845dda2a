"""The identity of an artifact: it changes with everything that decides results, and with nothing else."""

import dataclasses
import json
from pathlib import Path

import lragent
from lragent.artifact.manifest import identity, read_manifest
from lragent.files.checked_file import FileEntry


def test_compiled_packages_are_no_part_of_it(eager_artifact: Path) -> None:
    manifest = read_manifest(eager_artifact)
    packages = {"cpu": {"split-cpp-float32": FileEntry("compiled/x.pt2", 3, "0" * 64)}}
    assert identity(dataclasses.replace(manifest, compiled=packages)) == identity(manifest)
    assert "seal" not in identity(manifest) and "compiled" not in identity(manifest)


def test_every_other_entry_is(eager_artifact: Path) -> None:
    manifest = read_manifest(eager_artifact)
    before = identity(manifest)
    assert json.loads(json.dumps(before)) == before
    assert {*before, "compiled"} == {field.name for field in dataclasses.fields(manifest)}
    plan = dataclasses.replace(manifest.agents[0], digest="0" * 64)
    changed = identity(dataclasses.replace(manifest, agents=(plan, *manifest.agents[1:])))
    assert changed != before
    assert {name for name in before["agents"] if before["agents"][name] != changed["agents"][name]} == {plan.name}
    for name, value in {"max_positions": 7, "stop_token_ids": (1,), "refusal": "x" * 500, "dtype": "float16"}.items():
        other = identity(dataclasses.replace(manifest, **{name: value}))  # type: ignore[arg-type]
        assert {part for part in before if before[part] != other[part]} == {name}


def test_an_engine_has_that_of_its_artifact(eager_artifact: Path) -> None:
    engine = lragent.load(eager_artifact, backend="eager", kv_memory="4MiB")
    assert engine.program.identity() == identity(read_manifest(eager_artifact))
