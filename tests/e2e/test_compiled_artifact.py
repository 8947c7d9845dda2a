"""A compiled artifact in a process of its own: no model code, the compiled runner, one copy of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import lragent
from lragent.runtime.engine import Engine
from tests.e2e.scripts import SCRIPT, assert_equals_oracle, run_on_engine
from tests.models import WrittenModel, quiet

CHILD = """
import json, sys
import torch
import lragent.api, lragent.artifact.open, lragent.runtime.engine
torch.set_num_threads(1)

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

before = rss()
engine = lragent.load(sys.argv[1], sharing="base_lr_shared", kv_memory=int(sys.argv[2]))
with engine.trajectory(json.loads(sys.argv[3])) as t:
    turn = t.generate(sys.argv[4], max_new_tokens=5, ignore_eos=True)
print(json.dumps({
    "tokens": turn.token_ids,
    "grown": rss() - before,
    "peft": "peft" in sys.modules,
    "modeling": sorted(m for m in sys.modules if m.startswith("transformers.models.") and ".modeling_" in m
                       and ".auto." not in m),  # AutoTokenizer reads tables of names there
    "backend": engine.program.facts["backend"],
    "calls": engine.program.run.__closure__[0].cell_contents.calls,
    "steps": engine.stats().steps,
}))
"""
PROMPT = [5, 40, 77, 12, 90, 33]


def _child(artifact: Path, kv_memory: int, agent: str = "plan") -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(artifact), str(kv_memory), json.dumps(PROMPT), agent]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def test_a_process_that_runs_an_artifact_loads_no_model_code(
    tiny_artifact: Path, open_engine: Callable[..., Engine]
) -> None:
    found = _child(tiny_artifact, 1 << 20)
    assert (found["peft"], found["modeling"], found["backend"]) == (False, [], "compiled")
    assert found["calls"] == found["steps"] > 0
    with open_engine(tiny_artifact, "base_lr_shared").trajectory(PROMPT) as t:
        assert found["tokens"] == t.generate("plan", max_new_tokens=5, ignore_eos=True).token_ids


@pytest.mark.parametrize("scheme", ["base_lr_shared", "base_shared", "rebase_shared", "neutral_shared"])
def test_compiled_code_equals_the_definition(scheme: str, tiny_llama: WrittenModel, tiny_artifact: Path) -> None:
    engine = lragent.load(tiny_artifact, sharing=scheme, kv_memory="4MiB")
    assert_equals_oracle(tiny_llama, scheme, SCRIPT, run_on_engine(engine, SCRIPT))


def test_both_rows_of_a_token_read_pages_of_a_long_text(tiny_llama: WrittenModel, tiny_artifact: Path) -> None:
    """The kernel splits a long text between threads and reads its pages once for both rows."""
    text = [(7 * j + 3) % 120 for j in range(150)]
    script = (("append", text), ("turn", "plan", 12, None), ("turn", "base", 2, None), ("turn", "action", 3, None))
    engine = lragent.load(tiny_artifact, sharing="neutral_shared", kv_memory="4MiB")
    assert engine.program.facts["attention"] == "cpp"
    assert_equals_oracle(tiny_llama, "neutral_shared", script, run_on_engine(engine, script))


@pytest.mark.integration  # compiles a model of 200 MB
def test_memory_is_weights_once_and_the_cache(tmp_path: Path) -> None:
    """RSS grows by at most 1.15 times weights plus kv_memory, on a model whose weights outweigh everything else."""
    config = LlamaConfig(
        vocab_size=64000, hidden_size=768, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=12
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    lragent.convert(tmp_path / "model", {}, tmp_path / "m.lragent", layouts=("split",))
    weights = sum(f.stat().st_size for f in (tmp_path / "m.lragent" / "weights").iterdir())
    assert weights > 400e6
    kv_memory = 32 << 20
    found = _child(tmp_path / "m.lragent", kv_memory, agent="base")
    assert found["grown"] <= 1.15 * weights + kv_memory
