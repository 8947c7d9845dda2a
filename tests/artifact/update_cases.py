"""An artifact with adapters that update it, its turns, and those of an artifact made anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lragent
from lragent.runtime.engine import Engine
from tests.models import WrittenModel
from tests.models.variants import write_variants

PROMPT = [5, 40, 77, 12, 90, 33, 8, 61]


def write_adapters(folder: Path) -> WrittenModel:
    """Adapters: two of rank 4, a smaller one on fewer modules, a larger one, a DoRA."""
    configs: dict[str, dict[str, Any]] = {
        "plan": {},
        "action": {},
        "other": {"lora_alpha": 3},
        "small": {"r": 2, "target_modules": ["v_proj", "up_proj"]},
        "large": {"r": 6},
        "dora": {"use_dora": True, "target_modules": ["v_proj"]},
    }
    return write_variants(folder, "llama", configs)


def named(written: WrittenModel, *names: str, **renamed: str) -> dict[str, Path]:
    return {**{n: written.adapters[n] for n in names}, **{n: written.adapters[a] for n, a in renamed.items()}}


def turns_of(engine: Engine, agents: tuple[str, ...]) -> list[float]:
    """Log-probabilities of one turn of each agent."""
    with engine.trajectory(PROMPT) as t:
        return [p for agent in agents for p in t.generate(agent, max_new_tokens=4, ignore_eos=True).logprobs]


def turns_made_anew(written: WrittenModel, adapters: Mapping[str, Path], sharing: str, folder: Path) -> list[float]:
    """Log-probabilities that an artifact made anew computes."""
    out = folder / "anew.lragent"
    lragent.convert(written.model_dir, adapters, out, compiled=False, overwrite=True)
    return turns_of(lragent.load(out, sharing=sharing, backend="eager", kv_memory="1MiB"), (*adapters, "base"))
