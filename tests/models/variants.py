"""Adapters of any LoRA variant on a tiny model: one directory a role, each trained (randomly) on a base of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.models.architectures import ARCHITECTURES
from tests.models.written import WrittenModel, quiet, write_model


def write_variants(
    directory: Path, kind: str, configs: Mapping[str, Mapping[str, Any]], tied: bool = False
) -> WrittenModel:
    """Writes a model of `kind` and one adapter a role; `configs`: role -> settings of its LoraConfig.

    Args:
        tied: the LM head's weight is the embedding's.
    """
    written = write_model(directory / "plain", kind)
    if tied:
        _tie(written.model_dir)
    architecture = ARCHITECTURES[kind]
    adapters = {}
    for number, (role, settings) in enumerate(configs.items()):
        torch.manual_seed(100 + number)
        with quiet():
            base = AutoModelForCausalLM.from_pretrained(written.model_dir)
            config = LoraConfig(
                **{
                    "r": 4,
                    "lora_alpha": 8,
                    "target_modules": list(architecture.all_linear),
                    "fan_in_fan_out": architecture.fan_in_fan_out,
                    "task_type": "CAUSAL_LM",
                    **settings,
                }
            )
            model = get_peft_model(base, config)
            train_randomly(model)
            model.save_pretrained(directory / role)
        adapters[role] = directory / role
    return WrittenModel(written.model_dir, adapters)


def _tie(model_dir: Path) -> None:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        model.config.tie_word_embeddings = True
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        model.save_pretrained(model_dir)


def train_randomly(model: torch.nn.Module) -> None:
    """Moves everything that is trained far from where it starts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.1)
            elif "lora_magnitude" in name:
                parameter.mul_(0.6 + 0.8 * torch.rand_like(parameter))
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
