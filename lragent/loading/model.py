"""Stage 1: a model directory or a live PEFT model, with its adapters -> `LoadedModel`.

Everything that can be wrong with the input is found here, before anything is captured: a missing file, an adapter of
another base or architecture, a kind of adapter that is not supported. PEFT decides which modules an adapter is on and
puts its weights there; then its layers are read and replaced (`peft_layers.py`). The caller's live model is never
changed: modules are copied, tensors are shared.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lragent.errors import AdapterError, RequestError
from lragent.loading import adapter_config, adapter_files, checkpoint
from lragent.loading.adapter_weights import LoraWeights, ReplacedRows, digest, require_finite
from lragent.loading.peft_layers import Adapted, add_biases, put_hooks, take_apart
from lragent.probing.mask_limits import mask_limit
from lragent.probing.position_offset import position_offset
from lragent.probing.rotary_limits import rotary_limit
from lragent.program.agent import Agent

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

BASE_AGENT = "base"
INTERNAL = "adapter"  # PEFT's name of the adapter that is being read; agents' names may hold dots, PEFT's may not
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in eval mode with every adapter's weights known.

    Args:
        model: the module to capture; each adapted module is a hook (`lragent.loading.adapter_hook`).
        lora: module FQN -> agent name -> weights.
        lora_parameters: FQN of a hook's parameter in `model` -> (module FQN, "a" or "b").
        rows: module FQN -> agent name -> outputs (tokens) with weights of their own.
        groups: module FQN -> for each agent, the first agent whose A it shares; empty: whoever has an equal A.
        max_positions: how many positions a trajectory may have.
        position_offset: what the model adds to positions 0, 1, 2, ... when it isn't told them.
    """

    model: Any
    agents: tuple[Agent, ...]
    lora: Mapping[str, Mapping[str, LoraWeights]]
    lora_parameters: Mapping[str, tuple[str, str]]
    max_positions: int
    position_offset: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    dtype: torch.dtype
    architecture: str
    tokenizer_source: str | None
    rows: Mapping[str, Mapping[str, ReplacedRows]] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def load_directories(model_dir: str | Path, adapters: Mapping[str, str | Path], dtype: str = "auto") -> LoadedModel:
    """Reads a model directory (or GGUF file) and its adapters.

    Args:
        dtype: "auto" (float32 on CPU), "float32", "bfloat16" or "float16".

    Raises:
        ModelError, AdapterError, RequestError: says what was found, where, and what to do.
    """
    check_agent_names(adapters)
    paths = {name: Path(path) for name, path in adapters.items()}
    configs = {name: adapter_config.read_config(name, path) for name, path in paths.items()}
    adapter_config.require_same_base(configs)
    model = checkpoint.read_base(Path(model_dir), _resolve_dtype(dtype))
    files = {
        name: adapter_files.in_peft_names(
            name, path, adapter_files.read_weights(name, path), configs[name].get("modules_to_save") or (), model
        )
        for name, path in paths.items()
    }
    adapted = Adapted()
    # One at a time: PEFT can't hold adapters of all variants beside each other.
    for name, path in paths.items():
        with adapter_files.peft_errors(name, path):
            _inject(model, name, path, configs[name], files[name].tensors)
        take_apart(model, {name: INTERNAL}, adapted)
        add_biases(model, name, files[name].biases, adapted)
    return _describe(model, adapted, tuple(paths), str(model_dir))


def load_live(peft_model: Any, tokenizer_source: str | None = None) -> LoadedModel:
    """Reads a live PEFT model (or a plain causal LM); it is not changed.

    Raises:
        ModelError, AdapterError: see `load_directories`.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in peft_model.parameters()}
    shared.update({id(b): b for b in peft_model.buffers()})
    model = copy.deepcopy(peft_model, shared)
    names = list(getattr(model, "peft_config", {}))
    for name in names:
        config = model.peft_config[name].to_dict()
        adapter_config.require_supported(name, config, "the live model")
        if config.get("bias", "none") != "none":
            raise AdapterError(
                f"adapter {name}: bias={config['bias']!r}: the live model's own biases were trained over",
                "Save the adapter and convert it with the model directory, which still has them.",
            )
    check_agent_names(names)
    adapted = Adapted()
    causal_lm = model.get_base_model() if names else model
    take_apart(causal_lm, {name: name for name in names}, adapted)
    return _describe(causal_lm, adapted, names, tokenizer_source)


def check_agent_names(names: Mapping[str, object] | list[str]) -> None:
    for name in names:
        if name == BASE_AGENT:
            raise RequestError(
                f'agent name "{BASE_AGENT}" is reserved for the model without adapter', "Choose another name."
            )
        if not re.fullmatch(r"[\w.\-]+", name):
            raise RequestError(f"agent name {name!r} has characters other than letters, digits, _ . -", "Rename it.")


def _resolve_dtype(dtype: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32
    if dtype not in DTYPES:
        raise RequestError(f"unknown dtype {dtype!r}", f"Use one of auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _inject(model: Any, name: str, path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Lets PEFT put an adapter's layers and weights into the model."""
    from peft import PeftModel, set_peft_model_state_dict

    peft_model = PeftModel(
        model, adapter_config.lora_config(name, config), adapter_name=INTERNAL, autocast_adapter_dtype=False
    )
    report = set_peft_model_state_dict(peft_model, dict(tensors), adapter_name=INTERNAL)
    held = dict(peft_model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for key, parameter in held.items() if key not in report.missing_keys}
    # What is tied to something that is there (token rows of a tied LM head) is stored once.
    absent = [key for key in report.missing_keys if INTERNAL in key.split(".")]
    missing = [key for key in absent if key not in held or id(held[key]) not in loaded]
    if missing:
        raise AdapterError(f"adapter {name}: {path} has no weights for {missing[0]}", "Save the adapter again.")
    if report.unexpected_keys:
        raise AdapterError(
            f"adapter {name}: {path} has weights {report.unexpected_keys[0]}, which its config does not speak of",
            "Save the adapter again, with its own config.",
        )


def _describe(causal_lm: Any, adapted: Adapted, names: Sequence[str], tokenizer_source: str | None) -> LoadedModel:
    """Collects the facts of a model and of the agents `names`."""
    put_hooks(causal_lm, adapted)
    causal_lm.eval()
    for parameter in causal_lm.parameters():
        parameter.requires_grad_(False)
    config: PretrainedConfig = causal_lm.config.get_text_config()
    agents = []
    for name in names:
        lora = {m: by_agent[name] for m, by_agent in adapted.lora.items() if name in by_agent}
        rows = {m: by_agent[name] for m, by_agent in adapted.rows.items() if name in by_agent}
        for held in (lora, rows):
            for module, weights in held.items():
                require_finite(f"adapter {name}: module {module}", weights)
        if not lora and not rows:
            raise AdapterError(f"adapter {name} adapts no module of this model", "Check its target_modules.")
        agents.append(
            Agent(
                name=name,
                digest=digest(lora, rows),
                rank=max((weights.rank for weights in lora.values()), default=0),
                scalings=tuple(sorted({weights.scaling for weights in lora.values()})),
                targets=(*lora, *(m for m in rows if m not in lora)),
            )
        )
    offset = position_offset(causal_lm, int(config.vocab_size))
    positions = checkpoint.max_positions(config) - offset
    reach = _reach(causal_lm, positions, offset)
    return LoadedModel(
        model=causal_lm,
        agents=tuple(agents),
        lora=adapted.lora,
        lora_parameters=adapted.parameters,
        max_positions=reach,
        position_offset=offset,
        vocab_size=int(config.vocab_size),
        stop_token_ids=checkpoint.stop_tokens(causal_lm),
        dtype=next(p.dtype for p in causal_lm.parameters() if p.is_floating_point()),
        architecture=type(causal_lm).__name__,
        tokenizer_source=tokenizer_source,
        rows=adapted.rows,
    )


def _reach(causal_lm: Any, positions: int, offset: int) -> int:
    """How many positions are served exactly; says so where they are fewer than the model has."""
    reaches = {
        "rotates the keys of all tokens anew, and cached ones stay as they are": rotary_limit(
            causal_lm, positions, offset
        ),
        "hides tokens that are neither later nor outside a sliding window": mask_limit(causal_lm, positions, offset),
    }
    reason, reach = min(reaches.items(), key=lambda item: item[1])
    if reach < positions:
        log.warning("trajectories end at %d of the model's %d positions: beyond, it %s", reach, positions, reason)
    return reach
