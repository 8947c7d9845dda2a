"""Loads a model directory or a live PEFT model, with its adapters, into a `LoadedModel`.

Input errors are found here, before capture: a missing file, an adapter of another base or architecture, an unsupported
kind of adapter. PEFT injects an adapter's layers and weights into the model; then they are read and replaced by hooks
(`peft_layers.py`). The caller's live model is never changed: modules are copied, tensors are shared.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lragent.errors import AdapterError, RequestError
from lragent.loading import adapter_config, adapter_files, checkpoint
from lragent.loading.adapter_weights import LoraWeights, ReplacedRows, digest, require_finite
from lragent.loading.checkpoint_dtype import auto_dtype
from lragent.loading.hub import locate_adapter, locate_model
from lragent.loading.peft_layers import Adapted, add_biases, put_hooks, take_apart
from lragent.loading.tuned_metadata import tuned_for
from lragent.probing.mask_limits import mask_limit
from lragent.probing.position_offset import position_offset
from lragent.probing.rotary_limits import rotary_limit
from lragent.program.agent import BASE, Agent
from lragent.program.dtypes import dtype_named

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

INTERNAL = "adapter"  # adapter name inside PEFT, which allows no dots; names of agents may contain them
NO_PINS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in eval mode, and the weights of its adapters.

    Args:
        model: the module to capture; each adapted module is a hook (`lragent.loading.adapter_hook`).
        lora: module FQN -> agent name -> weights.
        max_positions: largest number of positions of a trajectory.
        position_offset: constant that the model adds to positions 0, 1, 2, ... when none are passed.
        dtype: dtype of the weights.
        tokenizer_source: directory or GGUF file of the tokenizer, or a live transformers tokenizer; None: unknown.
        rows: module FQN -> agent name -> replaced weight rows.
        groups: module FQN -> for each agent, index of the first agent with the same A; empty: found by comparing A.
        notes: sentences for the user about the files: a changed dtype, bases of other names.
        sources: agent, or `base` for the model -> hub id and commit "OWNER/NAME@COMMIT"; without those from a path.
        adapter_folders: agent name -> directory of its adapter; empty for a live model.
    """

    model: Any
    agents: tuple[Agent, ...]
    lora: Mapping[str, Mapping[str, LoraWeights]]
    max_positions: int
    position_offset: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    dtype: torch.dtype
    architecture: str
    tokenizer_source: Any
    rows: Mapping[str, Mapping[str, ReplacedRows]] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    adapter_folders: Mapping[str, Path] = field(default_factory=dict)


def load_directories(
    model_dir: str | Path, adapters: Mapping[str, str | Path], dtype: str = "auto", pins: Mapping[str, str] = NO_PINS
) -> LoadedModel:
    """Reads a model directory (or GGUF file) and its adapters.

    Args:
        model_dir: a path or a hub id; so are the values of `adapters` (`lragent.loading.hub`).
        dtype: "auto" (the checkpoint's, see `lragent.loading.checkpoint_dtype`), "float32", "bfloat16" or "float16".
        pins: known commits of hub ids, see `LoadedModel.sources`.

    Raises:
        ModelError: the model can't be found, read or run.
        AdapterError: an adapter is missing, damaged, unsupported, or does not fit the model.
        RequestError: an agent name or the dtype is not valid.
    """
    check_agent_names(adapters)
    wanted = None if dtype == "auto" else dtype_named(dtype)
    located = {name: locate_adapter(name, path, pins.get(name, "")) for name, path in adapters.items()}
    paths = {name: place.path for name, place in located.items()}
    configs = {name: adapter_config.read_config(name, path) for name, path in paths.items()}
    place = locate_model(model_dir, pins.get(BASE, ""))
    notes = [adapter_config.note_on_bases(configs)]
    if wanted is None:
        wanted, note = auto_dtype(checkpoint.find_checkpoint(place.path))
        notes.append(note)
    model = checkpoint.read_base(place.path, wanted)
    files = {
        name: adapter_files.in_peft_names(name, path, adapter_files.read_weights(name, path), configs[name], model)
        for name, path in paths.items()
    }
    adapted = Adapted()
    # One adapter at a time: PEFT can't mix adapters of all variants in one model.
    for name, path in paths.items():
        with adapter_files.peft_errors(name, path):
            _inject(model, name, path, configs[name], files[name].tensors)
        take_apart(model, {name: INTERNAL}, adapted)
        add_biases(model, name, files[name].biases, adapted)
    described = _describe(model, adapted, tuple(paths), str(place.path))
    agents = tuple(replace(agent, tuned_for=tuned_for(agent.name, paths[agent.name])) for agent in described.agents)
    pinned = {name: source.pin for name, source in {BASE: place, **located}.items() if source.pin}
    return replace(described, agents=agents, adapter_folders=paths, notes=tuple(filter(None, notes)), sources=pinned)


def load_live(peft_model: Any, tokenizer_source: Any = None) -> LoadedModel:
    """Reads a live PEFT model or a plain causal LM, without changing it.

    Args:
        tokenizer_source: see `LoadedModel`.

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
                f"adapter {name}: bias={config['bias']!r}: training has overwritten the live model's base biases",
                "Save the adapter and convert it with the model directory, which has the base biases.",
            )
    check_agent_names(names)
    adapted = Adapted()
    causal_lm = model.get_base_model() if names else model
    take_apart(causal_lm, {name: name for name in names}, adapted)
    return _describe(causal_lm, adapted, names, tokenizer_source)


def check_agent_names(names: Mapping[str, object] | list[str]) -> None:
    """Raises RequestError for a reserved name or one with characters other than letters, digits, `_`, `.`, `-`."""
    for name in names:
        if name == BASE:
            raise RequestError(f'agent name "{BASE}" is reserved for the model without adapter', "Choose another name.")
        if not re.fullmatch(r"[\w.\-]+", name):
            raise RequestError(f"agent name {name!r} has characters other than letters, digits, _ . -", "Rename it.")


def _inject(model: Any, name: str, path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Injects an adapter's layers and weights into the model with PEFT.

    Raises:
        AdapterError: weights are missing, or the file has weights outside the config's target modules.
    """
    from peft import PeftModel, set_peft_model_state_dict

    peft_model = PeftModel(
        model, adapter_config.lora_config(name, config), adapter_name=INTERNAL, autocast_adapter_dtype=False
    )
    report = set_peft_model_state_dict(peft_model, dict(tensors), adapter_name=INTERNAL)
    parameters = dict(peft_model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for key, parameter in parameters.items() if key not in report.missing_keys}
    # A tied parameter (token rows of a tied LM head) is stored once, under the name of the other.
    absent = [key for key in report.missing_keys if INTERNAL in key.split(".")]
    missing = [key for key in absent if key not in parameters or id(parameters[key]) not in loaded]
    if missing:
        raise AdapterError(f"adapter {name}: {path} has no weights for {missing[0]}", "Save the adapter again.")
    if report.unexpected_keys:
        raise AdapterError(
            f"adapter {name}: {path} has weights {report.unexpected_keys[0]}, which its config does not mention",
            "Save the adapter again, together with its config.",
        )


def _describe(causal_lm: Any, adapted: Adapted, names: Sequence[str], tokenizer_source: Any) -> LoadedModel:
    """Replaces adapted modules by hooks, and collects the facts of the model and of the agents `names`.

    Raises:
        ModelError: the model does not run, or has an unsupported attention call.
        AdapterError: an adapter adapts no module, or has infinite weights or NaN.
    """
    put_hooks(causal_lm, adapted)
    causal_lm.eval()
    for parameter in causal_lm.parameters():
        parameter.requires_grad_(False)
    config: PretrainedConfig = causal_lm.config.get_text_config()
    agents = []
    for name in names:
        lora = {m: by_agent[name] for m, by_agent in adapted.lora.items() if name in by_agent}
        rows = {m: by_agent[name] for m, by_agent in adapted.rows.items() if name in by_agent}
        for adapted_modules in (lora, rows):
            for module, weights in adapted_modules.items():
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
    return LoadedModel(
        model=causal_lm,
        agents=tuple(agents),
        lora=adapted.lora,
        max_positions=_exact_positions(causal_lm, positions, offset),
        position_offset=offset,
        vocab_size=int(config.vocab_size),
        stop_token_ids=checkpoint.stop_tokens(causal_lm),
        dtype=next(p.dtype for p in causal_lm.parameters() if p.is_floating_point()),
        architecture=type(causal_lm).__name__,
        tokenizer_source=tokenizer_source,
        rows=adapted.rows,
    )


def _exact_positions(causal_lm: Any, positions: int, offset: int) -> int:
    """Returns the number of positions that are served exactly; logs a warning if the model has more."""
    limits = {
        "changes the rotary frequencies of all tokens, which cached keys can't follow": rotary_limit(
            causal_lm, positions, offset
        ),
        "masks tokens that are neither later nor outside a sliding window": mask_limit(causal_lm, positions, offset),
    }
    reason, limit = min(limits.items(), key=lambda item: item[1])
    if limit < positions:
        log.warning(
            "trajectories are limited to %d of the model's %d positions: beyond, it %s", limit, positions, reason
        )
    return limit
