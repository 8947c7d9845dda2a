"""Writes a tiny random model, its tokenizer and three adapters the way a user would have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from tests.models.architectures import ARCHITECTURES, VOCAB

EOS = 127
RANKS: Mapping[str, int] = MappingProxyType({"plan": 4, "action": 8, "reflect": 4})


@dataclass(frozen=True)
class WrittenModel:
    """A model directory, and adapter directories by role."""

    model_dir: Path
    adapters: dict[str, Path]


def write_model(
    directory: Path,
    kind: str,
    targets: str | Mapping[str, str] = "all",
    shared_a: bool = False,
    ranks: Mapping[str, int] = RANKS,
    b_std: float = 0.2,
    layers: int = 2,
) -> WrittenModel:
    """Writes a model of `kind` with adapters of strong random weights; the same every time.

    Args:
        targets: "qv", "kv" or "all" (all linear modules outside experts); or one of them per role. Where q, k and v are
            one module, "qv" and "kv" are that module.
        shared_a: every adapter has the first one's A; needs equal ranks.
        b_std: standard deviation of B; weak adapters would hide what sharing schemes do.
        layers: three tell more than two. What an agent reads in the second layer of a pass whose logits nobody asks for
            (catch-up, adapter-free) shows in the third layer's cache only.

    Raises:
        ValueError: one A for adapters of different ranks.
    """
    if shared_a and len(set(ranks.values())) > 1:
        raise ValueError(f"one A for all adapters needs equal ranks, not {dict(ranks)}")
    architecture = ARCHITECTURES[kind]
    torch.manual_seed(0)
    with quiet():
        base = AutoModelForCausalLM.from_config(architecture.config(layers)).eval()
        _make_strong(base)
        base.generation_config.eos_token_id = EOS
        model_dir = directory / "model"
        base.save_pretrained(model_dir)
        _write_tokenizer(model_dir)
        model: Any = base
        for role, rank in ranks.items():
            config = LoraConfig(
                r=rank,
                lora_alpha=2 * rank if role != "action" else rank,
                target_modules=list(architecture.modules(targets if isinstance(targets, str) else targets[role])),
                fan_in_fan_out=architecture.fan_in_fan_out,
                task_type="CAUSAL_LM",
            )
            if model is base:
                model = get_peft_model(base, config, adapter_name=role)
            else:
                model.add_adapter(role, config)
        _fill_adapters(model, next(iter(ranks)), shared_a, b_std)
        model.save_pretrained(directory / "adapters")
    return WrittenModel(model_dir, {role: directory / "adapters" / role for role in ranks})


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and chatter."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _make_strong(model: torch.nn.Module) -> None:
    """Biases, norm weights and sinks away from zeros and ones; matrices large enough for peaked attention."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.std() == 0:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)


def _fill_adapters(model: torch.nn.Module, first: str, shared_a: bool, b_std: float) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B." in name:
                parameter.normal_(std=b_std)
            elif ".lora_A." in name and shared_a:
                role = name.split(".")[-2]
                parameter.copy_(parameters[name.replace(f".{role}.", f".{first}.")])


def _write_tokenizer(model_dir: Path) -> None:
    """One id a printable character; id 127 is the end of text.

    Byte level and without merges, since transformers reads a qwen2 tokenizer that way whatever its files say.
    """
    characters = {chr(32 + i): i for i in range(95)} | {"\n": 95}
    vocab = {_byte_level(c): i for c, i in characters.items()} | {f"<{i}>": i for i in range(96, VOCAB - 1)}
    vocab["<eos>"] = EOS
    tokenizer = Tokenizer(BPE(vocab, [], unk_token="<96>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<96>", pad_token="<eos>"
    ).save_pretrained(model_dir)


def _byte_level(character: str) -> str:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)[0][0]
