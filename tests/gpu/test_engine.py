"""An artifact on the device: the same tokens as on the CPU, op by op and compiled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest import mock

import pytest
import torch

import lragent
from tests.models import write_model

pytestmark = pytest.mark.gpu


def _tokens(artifact: Path, **options: str) -> list[list[int]]:
    engine = lragent.load(artifact, kv_memory="8MiB", **options)  # type: ignore[arg-type]
    with engine.trajectory([5, 17, 3, 44, 9, 8, 7] * 9) as trajectory:
        return [
            trajectory.generate(agent, max_new_tokens=8, ignore_eos=True).token_ids
            for agent in ("plan", "action", "plan", "reflect")
        ]


@pytest.mark.parametrize("sharing", ["base_lr_shared", "non_shared"])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_same_tokens_as_on_the_cpu(tmp_path: Path, backend: str, sharing: str) -> None:
    written = write_model(tmp_path, "llama")
    artifact = tmp_path / "tiny.lragent"
    lragent.convert(written.model_dir, written.adapters, artifact, compiled=False)
    expected = _tokens(artifact, sharing=sharing, backend="eager", attention="torch")
    assert _tokens(artifact, sharing=sharing, backend=backend, device="cuda") == expected


def test_eager_is_the_default_on_a_gpu(tmp_path: Path) -> None:
    written = write_model(tmp_path, "llama")
    lragent.convert(written.model_dir, written.adapters, tmp_path / "tiny.lragent", compiled=False)
    engine = lragent.load(tmp_path / "tiny.lragent", kv_memory="8MiB", device="cuda")
    assert engine.program.facts["backend"] == "eager"


def _many_tokens(artifact: Path, **options: str) -> list[list[int]]:
    """Ten trajectories at once, whose turns end at different steps: steps of many sizes."""
    engine = lragent.load(artifact, kv_memory="8MiB", max_batch_tokens=64, **options)  # type: ignore[arg-type]
    trajectories = [engine.trajectory([5 + i, 17, 3, 44, 9, 8, 7] * (2 + i)) for i in range(10)]
    agents = ("plan", "action", "reflect")

    async def turns(i: int) -> list[int]:
        found = []
        for turn in range(3):
            agent = agents[(i + turn) % 3]
            found += (await trajectories[i].agenerate(agent, max_new_tokens=8 + i, ignore_eos=True)).token_ids
            trajectories[i].append([11, 12, 13, 14 + i])
        return found

    async def all_turns() -> list[list[int]]:
        return await asyncio.gather(*(turns(i) for i in range(len(trajectories))))

    return asyncio.run(all_turns())


@pytest.mark.parametrize("sharing", ["base_lr_shared", "rebase_shared", "full_shared", "neutral_shared"])
def test_steps_become_graphs_and_give_the_same_tokens(tmp_path: Path, sharing: str) -> None:
    written = write_model(tmp_path, "llama")
    artifact = tmp_path / "tiny.lragent"
    lragent.convert(written.model_dir, written.adapters, artifact, compiled=False)
    expected = _many_tokens(artifact, sharing=sharing, backend="eager", attention="torch")
    replay = torch.cuda.CUDAGraph.replay
    with mock.patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=replay) as replays:
        assert _many_tokens(artifact, sharing=sharing, backend="eager", device="cuda") == expected
    assert replays.call_count > 10


def test_updated_adapters(tmp_path: Path) -> None:
    """New weights are copied to where the device's graphs read them, captured ones too."""
    written = write_model(tmp_path, "llama", ranks={"plan": 4, "action": 4, "reflect": 4})
    artifact = tmp_path / "tiny.lragent"
    lragent.convert(written.model_dir, written.adapters, artifact, compiled=False)
    swapped = {"plan": written.adapters["action"], "action": written.adapters["plan"]}
    tokens: list[list[list[int]]] = []
    for options in ({"attention": "torch"}, {"device": "cuda"}):
        engine = lragent.load(artifact, "base_lr_shared", "8MiB", backend="eager", **options)  # type: ignore[arg-type]
        found: list[list[int]] = []
        for update in ({}, swapped):
            engine.update_adapters(update)
            for agent in ("plan", "action"):
                with engine.trajectory([5, 17, 3, 44, 9, 8, 7] * 9) as t:
                    found.append(t.generate(agent, max_new_tokens=8, ignore_eos=True).token_ids)
        tokens.append(found)
    assert tokens[0] == tokens[1]
