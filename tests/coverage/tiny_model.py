"""A tiny random model of any type, with three strong adapters on all its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from tests.coverage.feeds import linear_layers
from tests.coverage.rotary import ROTARY, with_rotary
from tests.coverage.tiny_config import VOCAB, tiny_config
from tests.models import quiet

PADDING = 0
AGENTS = {"plan": 4, "action": 6, "reflect": 4}


def types() -> list[str]:
    """All causal LM types that transformers knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def plain_model(kind: str) -> Any:
    """A tiny random causal LM in eval mode, the first one that runs on token ids, else the first that was built.

    Args:
        kind: a type, or a row of `ROTARY`.

    Raises:
        Exception: transformers' own, where it builds none.
    """
    kind, rotary = ROTARY.get(kind, (kind, None))
    built: list[Any] = []
    failed: list[Exception] = []
    for fill, of_each in ((False, 1), (True, 1), (False, 2)):
        try:
            config = tiny_config(CONFIG_MAPPING[kind], fill, of_each)
            built.append(_build(with_rotary(config, rotary) if rotary else config))
            logits(built[-1], list(range(1, 13)))
        except Exception as error:
            failed.append(error)
            continue
        return built[-1]
    if not built:
        raise failed[0]
    return built[0]


def _build(config: Any) -> Any:
    for each in _configs(config):
        for name in ("is_decoder", "is_causal"):
            if isinstance(getattr(each, name, None), bool):
                setattr(each, name, True)
        each.use_cache = False
        if getattr(each, "pad_token_id", None) is not None:
            each.pad_token_id = PADDING
    torch.manual_seed(0)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # Of a model with encoders of its own, the causal LM may be a part with a config of its own.
    own = next((c for c in _configs(config) if isinstance(c, model_class.config_class)), config)
    with quiet():
        model = (
            model_class._from_config(own, attn_implementation="eager", experts_implementation="eager").eval().float()
        )
    _make_strong(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = VOCAB - 1
    return model


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _configs(value)


def _make_strong(model: torch.nn.Module) -> None:
    """Random values everywhere: norm weights and biases away from ones and zeros, attention far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):  # others are tables of sines
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.2 * noise)


def adapted_model(kind: str) -> Any:
    """PEFT's model with one adapter an agent on every linear layer but the LM head."""
    try:
        model = _with_adapters(plain_model(kind), lambda module: True)
        logits(model, list(range(1, 5)))
    except (RuntimeError, AttributeError, TypeError):
        # PEFT calls a layer's own forward with the plain one's arguments: leave out those with another.
        plain = (torch.nn.Linear.forward, Conv1D.forward)
        model = _with_adapters(plain_model(kind), lambda module: type(module).forward in plain)
    return model


def _with_adapters(model: Any, wanted: Callable[[Any], bool]) -> Any:
    torch.manual_seed(2)
    head = model.get_output_embeddings()
    targets = [n for n, m in linear_layers(model).items() if m is not head and wanted(m)]
    targets = [name for name in _as_layers(targets, model) if not _of_recurrence(model, name)]
    with quiet():
        wrapped: Any = None
        for agent, rank in AGENTS.items():
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
            if wrapped is None:
                wrapped = get_peft_model(model, config, adapter_name=agent, autocast_adapter_dtype=False)
            else:
                wrapped.add_adapter(agent, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    return wrapped.eval()


def _of_recurrence(model: Any, name: str) -> bool:
    """PEFT refuses the output layer beside a short convolution: recurrent layers never call it."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "out_proj" and hasattr(model.get_submodule(parent), "conv1d")


def _as_layers(names: list[str], model: Any) -> list[str]:
    """Those that PEFT adapts as layers: a name that a type's experts had before their weights were fused, it takes for
    the fused weights, wherever it stands."""
    config = LoraConfig(target_modules=names)
    convert_peft_config_for_transformers(config, model, None)
    return sorted(config.target_modules) if config.target_parameters else names


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits `[T, vocab]` of a plain forward pass without a cache."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found


def is_causal(model: Any) -> bool:
    """Whether another last token leaves the logits of all earlier ones as they were."""
    ids = [5, 40, 77, 12, 90, 33, 8, 61, 102, 55]
    before, after = logits(model, ids)[:-1], logits(model, [*ids[:-1], 17])[:-1]
    return bool(torch.isfinite(before).all()) and float((before - after).abs().max()) < 1e-4
