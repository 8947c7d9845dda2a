"""The oracle itself: exact where the definitions say so, different where they differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import KINDS, write_model
from tests.oracle.peft_oracle import load_peft, logprobs
from tests.oracle.precision import computing_in
from tests.oracle.sharing_oracle import SCHEMES, assert_schemes_differ, new_oracle, run_script

PROMPT = [5, 40, 77, 12, 90, 33, 8, 61, 102, 55, 7, 19]
FORCED = [[11, 29, 83, 64], [3, 99, 21], [70, 14, 52, 88], [35, 6, 120], [44, 101, 9]]
SCRIPT = [
    ("append", PROMPT),
    ("turn", "plan", 4, FORCED[0]),
    ("append", [17, 23]),
    ("turn", "action", 3, FORCED[1]),
    ("turn", "plan", 4, FORCED[2]),
    ("append", [91]),
    ("turn", "base", 3, FORCED[3]),
    ("turn", "reflect", 3, FORCED[4]),
]


MIXED = {"plan": "qv", "action": "kv", "reflect": "all"}  # no two agents adapt the same modules


@pytest.mark.parametrize(("kind", "targets"), [*((kind, "all") for kind in KINDS), ("llama", MIXED), ("qwen3", MIXED)])
def test_non_shared_is_peft(kind: str, targets: str | dict[str, str], tmp_path: Path) -> None:
    written = write_model(tmp_path, kind, targets)
    results = run_script(written.model_dir, written.adapters, "non_shared", SCRIPT)
    model = load_peft(written.model_dir, written.adapters, torch.float64)
    ids: list[int] = []
    turns = iter(results)
    for step in SCRIPT:
        if step[0] == "append":
            ids += step[1]
            continue
        found = next(turns)
        start = len(ids)
        ids += found.token_ids
        expected = logprobs(model, ids, step[1])
        for i, token in enumerate(found.token_ids):
            assert found.logprobs[i] == pytest.approx(float(expected[start + i - 1, token]), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_one_agent_alone_is_exact_under_every_scheme_that_keeps_its_cache(kind: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, kind)
    script = [step for step in SCRIPT if step[0] == "append" or step[1] == "plan"]
    results = {s: run_script(written.model_dir, written.adapters, s, script) for s in SCHEMES}
    for scheme in ("full_shared", "base_shared", "base_lr_shared"):
        for found, expected in zip(results[scheme], results["non_shared"], strict=True):
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-9), scheme
    # rebase_shared rewrites the base under the agent's own columns: its second turn differs.
    assert results["rebase_shared"][0].logprobs == pytest.approx(results["non_shared"][0].logprobs, abs=1e-9)
    assert results["rebase_shared"][1].logprobs != pytest.approx(results["non_shared"][1].logprobs, abs=1e-6)


@pytest.mark.parametrize("scheme", ["rebase_shared", "neutral_shared"])
def test_base_streams_do_not_depend_on_who_wrote(scheme: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, "llama")
    wrote = new_oracle(written.model_dir, written.adapters, scheme, torch.float64)
    alone = new_oracle(written.model_dir, written.adapters, scheme, torch.float64)
    for step in SCRIPT:
        if step[0] == "append":
            wrote.ids += step[1]
        else:
            wrote.turn(*step[1:])
    alone.ids = wrote.ids[:-1]
    alone.turn("base", 1, [wrote.ids[-1]])
    for found, expected in zip(wrote.base_streams(), alone.base_streams(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize("targets", ["qv", "all"])
def test_schemes_differ(targets: str, shared_a: bool, tmp_path: Path) -> None:
    ranks = {"plan": 4, "action": 4, "reflect": 4}
    written = write_model(tmp_path, "llama", targets, shared_a, ranks)
    assert_schemes_differ({s: run_script(written.model_dir, written.adapters, s, SCRIPT) for s in SCHEMES})


def test_running_the_last_token_again_keeps_nothing(tmp_path: Path) -> None:
    written = write_model(tmp_path, "llama")
    for scheme in SCHEMES:
        oracle = new_oracle(written.model_dir, written.adapters, scheme, torch.float64)
        oracle.ids = list(PROMPT)
        oracle.turn("plan", 3, FORCED[0][:3])
        oracle.truncate(10)
        undisturbed, disturbed = oracle.fork(), oracle.fork()
        disturbed.turn("action", 1)  # runs plan's token 9 again
        disturbed.truncate(10)
        found = []
        for branch in (undisturbed, disturbed):
            branch.ids += [17]  # so that plan reads token 9 and does not run it again itself
            found.append(branch.turn("plan", 2, [5, 6]).logprobs)
        assert found[1] == pytest.approx(found[0], abs=1e-9), scheme


def test_float64_has_no_float32_step(tmp_path: Path) -> None:
    """Hugging Face's RMSNorm casts to float32; not in the oracle's float64."""
    written = write_model(tmp_path, "llama")
    norm = load_peft(written.model_dir, written.adapters, torch.float64).get_base_model().model.norm
    x = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    with torch.no_grad(), computing_in(torch.float64):
        torch.testing.assert_close(norm(x), expected.detach(), rtol=0, atol=1e-14)
