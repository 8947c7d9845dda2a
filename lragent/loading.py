"""Stage 1: a model directory or a live PEFT model, with its adapters -> `LoadedModel`.

Everything that can be wrong with the input is found here, before anything is captured: a missing file, an adapter of
another base or architecture, a kind of adapter that is not supported. The caller's live model is never changed: modules
are copied, tensors are shared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lragent import adapter_files
from lragent.errors import AdapterError, ModelError, RequestError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BASE_AGENT = "base"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Agent:
    """One named adapter: `targets` are FQNs of the modules it adapts; `rank` its largest; digest: sha256 of weights."""

    name: str
    digest: str
    rank: int
    targets: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class LoraWeights:
    """One adapter on one linear module: `y = W x + scaling * B A x`; A `[r, in]`, B `[out, r]`."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in eval mode with every adapter's weights known.

    Args:
        model: the module to capture; a cover of the adapted modules is active in it (`active`).
        lora: module FQN -> agent name -> weights.
        lora_parameters: FQN of a lora_A / lora_B weight in `model` -> (module FQN, "a" or "b").
    """

    model: Any
    agents: tuple[Agent, ...]
    lora: Mapping[str, Mapping[str, LoraWeights]]
    lora_parameters: Mapping[str, tuple[str, str]]
    max_positions: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    dtype: torch.dtype
    architecture: str
    tokenizer_source: str | None


def load_directories(model_dir: str | Path, adapters: Mapping[str, str | Path], dtype: str = "auto") -> LoadedModel:
    """Reads a model directory and its adapters.

    Args:
        dtype: "auto" (float32 on CPU), "float32", "bfloat16" or "float16".

    Raises:
        ModelError, AdapterError, RequestError: says what was found, where, and what to do.
    """
    from peft import PeftModel

    check_agent_names(adapters)
    configs = {name: adapter_files.read_config(name, Path(path)) for name, path in adapters.items()}
    adapter_files.require_same_base(configs)
    base = _read_base(Path(model_dir), _resolve_dtype(dtype))
    if not adapters:
        return _describe(base, {}, {}, tokenizer_source=str(model_dir))
    sizes = adapter_files.linear_sizes(base)
    model: Any = None
    # PEFT's adapter names become module names, which can't hold dots: use names of our own.
    internal = {name: f"adapter{i}" for i, name in enumerate(adapters)}
    for name, path in adapters.items():
        weights = adapter_files.read_weights(name, Path(path))
        adapter_files.require_fits(name, Path(path), weights, sizes, type(base).__name__)
        with adapter_files.peft_errors(name, Path(path)):
            if model is None:
                model = PeftModel.from_pretrained(
                    base, str(path), adapter_name=internal[name], autocast_adapter_dtype=False
                )
                missing: list[str] = []
            else:
                report = model.load_adapter(str(path), adapter_name=internal[name], autocast_adapter_dtype=False)
                missing = [key for key in report.missing_keys if internal[name] in key.split(".")]
        if missing:
            raise AdapterError(f"adapter {name}: {path} has no weights for {missing[0]}", "Save the adapter again.")
    sources = {name: str(path) for name, path in adapters.items()}
    return _describe(model, internal, sources, tokenizer_source=str(model_dir))


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
        adapter_files.require_supported(name, model.peft_config[name].to_dict(), "the live model")
    check_agent_names(names)
    return _describe(model, {n: n for n in names}, {n: "live model" for n in names}, tokenizer_source)


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


def _read_base(model_dir: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not model_dir.is_dir():
        raise ModelError(f"no model directory at {model_dir}", "Give a folder with config.json and safetensors files.")
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir} has no config.json", "Give a folder saved with save_pretrained.")
    try:
        config = AutoConfig.from_pretrained(model_dir)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"{model_dir} is quantised", "Convert from the unquantised checkpoint.")
        model, info = AutoModelForCausalLM.from_pretrained(
            model_dir, config=config, dtype=dtype, output_loading_info=True
        )
    except ModelError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise ModelError(
            f"transformers can't load a causal LM from {model_dir}: {type(error).__name__}: {text[0] if text else ''}",
            "Check that all weight files are there and whole.",
        ) from error
    if info["missing_keys"]:
        some = sorted(info["missing_keys"])
        raise ModelError(f"{model_dir} lacks {len(some)} weights, {some[0]} for one", "The checkpoint is not complete.")
    if info["mismatched_keys"]:
        some = sorted(info["mismatched_keys"])
        raise ModelError(f"{model_dir}: weight {some[0]} does not fit config.json", "Check the checkpoint.")
    return model


def _describe(
    model: Any, internal: Mapping[str, str], sources: Mapping[str, str], tokenizer_source: str | None
) -> LoadedModel:
    """Collects the facts of a loaded model; `internal` maps agent names to PEFT adapter names."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora, parameters = _collect_lora(model, internal)
    if internal:
        active = _cover(lora, list(internal))
        model.base_model.set_adapter([internal[name] for name in active], inference_mode=True)
    causal_lm = model.get_base_model() if internal else model
    names = {id(p): n for n, p in causal_lm.named_parameters(remove_duplicate=False)}
    config: PretrainedConfig = causal_lm.config.get_text_config()
    agents = tuple(
        Agent(
            name=name,
            digest=adapter_files.digest({m: lora[m][name] for m in lora if name in lora[m]}),
            rank=max((lora[m][name].rank for m in lora if name in lora[m]), default=0),
            targets=tuple(m for m in lora if name in lora[m]),
            source=sources[name],
        )
        for name in internal
    )
    for agent in agents:
        if not agent.targets:
            raise AdapterError(f"adapter {agent.name} adapts no module of this model", "Check its target_modules.")
    floating = next(p.dtype for p in causal_lm.parameters() if p.is_floating_point())
    return LoadedModel(
        model=causal_lm,
        agents=agents,
        lora=lora,
        lora_parameters={names[key]: value for key, value in parameters.items() if key in names},
        max_positions=_max_positions(config),
        vocab_size=int(config.vocab_size),
        stop_token_ids=_stop_tokens(causal_lm),
        dtype=floating,
        architecture=type(causal_lm).__name__,
        tokenizer_source=tokenizer_source,
    )


def _collect_lora(
    model: Any, internal: Mapping[str, str]
) -> tuple[dict[str, dict[str, LoraWeights]], dict[int, tuple[str, str]]]:
    """All LoRA weights by module FQN and agent; and the role of each captured parameter by identity."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    lora: dict[str, dict[str, LoraWeights]] = {}
    parameters: dict[int, tuple[str, str]] = {}
    root = model.get_base_model() if internal else model
    for fqn, module in root.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if type(module) is not LoraLinear:
            raise AdapterError(
                f"module {fqn} is adapted as {type(module).__name__}, which is not supported",
                "Adapters on linear layers are supported: leave this module out of target_modules.",
            )
        if module.merged:
            raise AdapterError(f"module {fqn} has a merged adapter", "Call unmerge_adapter() on the model first.")
        if module.disable_adapters:
            module.enable_adapters(True)
        for name, key in internal.items():
            if key not in module.lora_A:
                continue
            dtype = module.get_base_layer().weight.dtype
            for part, layer in (("a", module.lora_A[key]), ("b", module.lora_B[key])):
                if layer.weight.dtype != dtype:
                    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
                parameters[id(layer.weight)] = (fqn, part)
            lora.setdefault(fqn, {})[name] = LoraWeights(
                a=module.lora_A[key].weight.detach(),
                b=module.lora_B[key].weight.detach(),
                scaling=float(module.scaling[key]),
            )
    return lora, parameters


def _cover(lora: Mapping[str, Mapping[str, LoraWeights]], names: list[str]) -> list[str]:
    """Fewest agents (greedily) so that every adapted module has an active adapter: capture cost grows with them."""
    open_modules = set(lora)
    chosen: list[str] = []
    while open_modules:
        best = max(names, key=lambda name: sum(name in lora[m] for m in open_modules))
        chosen.append(best)
        open_modules = {m for m in open_modules if best not in lora[m]}
    return chosen


def _max_positions(config: Any) -> int:
    for attribute in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, attribute, None)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(
        "config.json does not say how many positions the model has", "Set max_position_embeddings in config.json."
    )


def _stop_tokens(model: Any) -> tuple[int, ...]:
    """Default stops: generation_config first, then the config."""
    for holder in (getattr(model, "generation_config", None), model.config):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
    return ()
