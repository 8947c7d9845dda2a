"""Every LoRA variant equals PEFT under `non_shared`; where it touches K or V, sharing equals its definition.

Adapters of a set are of different variants, and PEFT loads each of them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lragent
from lragent.errors import SplitRefused
from lragent.runtime.engine import Engine
from tests.e2e.scripts import PROMPT, SCRIPT, assert_equals_oracle, require_schemes_differ, run_on_engine
from tests.models import WrittenModel, quiet
from tests.models.variants import write_variants
from tests.oracle.peft_oracle import BASE, load_peft, load_plain, logprobs

QVO = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


@dataclass(frozen=True)
class Set:
    """Adapters of one artifact: settings of each role's LoraConfig."""

    kind: str
    configs: Mapping[str, Mapping[str, Any]]
    tied: bool = False


SETS = {
    "ranks": Set(
        "llama",
        {
            "rslora": {"use_rslora": True, "r": 6},
            "patterns": {"rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"q_proj": 24}},
            "layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "k_proj", "v_proj"]},
        },
    ),
    "biases": Set(
        "qwen2",
        {
            "lora_bias": {"lora_bias": True},
            "lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
            "all": {"bias": "all", "r": 2},
            "dora": {"bias": "lora_only", "use_dora": True, "target_modules": QVO},
        },
    ),
    "dora": Set(
        "qwen2",
        {
            "dora": {"use_dora": True, "target_modules": QVO},
            "dora_more": {"use_dora": True, "use_rslora": True, "r": 2, "target_modules": QVO},
            "plain": {},
        },
    ),
    "dora on keys": Set("llama", {"dora": {"use_dora": True}, "plain": {}}),
    "dora without rotation": Set("gpt2", {"dora": {"use_dora": True}, "plain": {}}),
    "embeddings": Set(
        "llama",
        {
            "lora": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
            "dora": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
            "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
            "tokens": {"trainable_token_indices": PROMPT[:5]},
        },
    ),
    "adapted embeddings": Set(
        "llama",
        {
            "lora": {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"]},
            "dora": {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"], "use_dora": True},
        },
    ),
    "tied embeddings": Set(
        "qwen2",
        {
            "lora": {"target_modules": ["q_proj", "embed_tokens"]},
            "saved": {"modules_to_save": ["lm_head"]},
            "tokens": {"trainable_token_indices": PROMPT[:5]},
        },
        tied=True,
    ),
    "embeddings tied by PEFT": Set(
        "llama",
        {
            "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            "both": {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens", "lm_head"],
                "ensure_weight_tying": True,
            },
            "lora": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
            "tokens": {
                "target_modules": ["q_proj"],
                "trainable_token_indices": PROMPT[:5],
                "ensure_weight_tying": True,
            },
        },
        tied=True,
    ),
    "scaled embeddings": Set(
        "gemma3_text",
        {
            "lora": {"target_modules": ["q_proj", "embed_tokens"]},
            "tokens": {"trainable_token_indices": PROMPT[:5]},
        },
    ),
    "saved projections": Set("llama", {"saved": {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]}}),
}
# Sets that split layout takes, and those that it refuses, with the reason.
SPLIT = ("ranks", "dora", "dora without rotation", "adapted embeddings")
REFUSED = {
    "dora on keys": "layer 0 key: it is a DoRA, whose magnitudes differ between channels that are rotated",
    "saved projections": "layer 0 value: an agent replaces its whole weight",
}


class VariantArtifacts:
    """Sets by name, each converted when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[str, tuple[WrittenModel, Path]] = {}

    def get(self, name: str) -> tuple[WrittenModel, Path]:
        if name not in self._made:
            folder = self._directory / name.replace(" ", "-")
            written = write_variants(folder, SETS[name].kind, SETS[name].configs, SETS[name].tied)
            out = folder / "m.lragent"
            layouts = ("dense",) if name in REFUSED else ("split",)
            lragent.convert(written.model_dir, written.adapters, out, layouts=layouts, compiled=False)
            self._made[name] = (written, out)
        return self._made[name]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> VariantArtifacts:
    return VariantArtifacts(tmp_path_factory.mktemp("variants"))


def peft_alone(written: WrittenModel, agent: str, dtype: torch.dtype) -> Any:
    """The agent's adapter alone on the base, as PEFT loads it."""
    if agent == BASE:
        return load_plain(written.model_dir, dtype)
    return load_peft(written.model_dir, {agent: written.adapters[agent]}, dtype)


@pytest.mark.parametrize("name", SETS)
def test_non_shared_equals_peft(name: str, variants: VariantArtifacts, open_engine: Callable[..., Engine]) -> None:
    written, artifact = variants.get(name)
    engine = open_engine(artifact, "non_shared")
    ids = list(PROMPT)
    for agent in (*written.adapters, BASE, next(iter(written.adapters))):
        with engine.trajectory(ids) as t:
            turn = t.generate(agent, max_new_tokens=5, ignore_eos=True)
        ids += turn.token_ids
        rows = slice(len(ids) - 6, len(ids) - 1)
        exact, single = (
            logprobs(peft_alone(written, agent, dtype), ids, agent)[rows] for dtype in (torch.float64, torch.float32)
        )
        chosen = torch.tensor(turn.token_ids)[:, None]
        allowed = 4 * float((single - exact).gather(1, chosen).abs().max())
        found = torch.tensor(turn.logprobs, dtype=torch.float64)
        assert float((found - exact.gather(1, chosen)[:, 0]).abs().max()) <= max(allowed, 1e-6), agent
        two = exact.topk(2).values
        decided = two[:, 0] - two[:, 1] > 1e-4
        assert torch.equal(exact.argmax(1)[decided], chosen[:, 0][decided]), agent


@pytest.mark.parametrize("scheme", ["base_shared", "base_lr_shared", "rebase_shared", "neutral_shared"])
@pytest.mark.parametrize("name", SPLIT)
def test_shared_schemes_equal_their_definition(
    name: str, scheme: str, variants: VariantArtifacts, open_engine: Callable[..., Engine]
) -> None:
    written, artifact = variants.get(name)
    script = script_for(written)
    turns = run_on_engine(open_engine(artifact, scheme), script)
    assert_equals_oracle(written, scheme, script, turns)
    require_schemes_differ(written, script, turns, ("non_shared", scheme))


def script_for(written: WrittenModel) -> list[Any]:
    """The usual script with its three roles played by the set's agents."""
    names = list(written.adapters)
    roles = {role: names[i % len(names)] for i, role in enumerate(("plan", "action", "reflect"))}
    return [(step[0], roles.get(step[1], step[1]), *step[2:]) if step[0] == "turn" else step for step in SCRIPT]


@pytest.mark.parametrize("name", REFUSED)
def test_split_layout_is_refused(name: str, variants: VariantArtifacts, tmp_path: Path) -> None:
    written, artifact = variants.get(name)
    with pytest.raises(SplitRefused, match=REFUSED[name]):
        lragent.load(artifact, sharing="base_lr_shared")
    with pytest.raises(SplitRefused, match=REFUSED[name]):
        lragent.convert(written.model_dir, written.adapters, tmp_path / "x.lragent", compiled=False)


def test_a_trained_bias_is_shared_as_a_bias_of_lora_b(tmp_path: Path, open_engine: Callable[..., Engine]) -> None:
    """PEFT can't hold two adapters with trained biases, so the oracle can't: but the same constant may be written as a
    bias of lora_B, which it can."""
    from safetensors.torch import load_file, save_file

    written = write_variants(tmp_path, "qwen2", {"one": {"bias": "lora_only"}, "two": {"lora_bias": True}})
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(written.model_dir)
    source, target = (written.adapters[name] / "adapter_model.safetensors" for name in ("one", "two"))
    tensors = load_file(source)
    same = {}
    for key, tensor in tensors.items():
        if key.endswith(".base_layer.bias"):
            module = key.removeprefix("base_model.model.").removesuffix(".base_layer.bias")
            own = base.get_submodule(module).bias.detach()
            same[key.replace(".base_layer.bias", ".lora_B.bias")] = (tensor - own) / 2
        else:
            same[key] = tensor
    for key, tensor in load_file(target).items():
        same.setdefault(key, torch.zeros_like(tensor))
    save_file(same, target, metadata={"format": "pt"})
    other = WrittenModel(written.model_dir, {"two": written.adapters["two"]})
    outputs = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.lragent"
        lragent.convert(written.model_dir, {"agent": written.adapters[name]}, out, compiled=False)
        script = [(s[0], "agent", *s[2:]) if s[0] == "turn" and s[1] != "base" else s for s in SCRIPT]
        outputs.append(run_on_engine(open_engine(out, "base_lr_shared"), script))
    assert [t.token_ids for t in outputs[0]] == [t.token_ids for t in outputs[1]]
    assert_equals_oracle(
        WrittenModel(other.model_dir, {"agent": other.adapters["two"]}), "base_lr_shared", script, outputs[1]
    )
