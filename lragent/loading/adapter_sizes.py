"""Checks the tensors of an adapter's file against the modules of the base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lragent.errors import AdapterError
from lragent.loading.peft_layers import in_out

# Largest relative difference of a number that was rounded to float16 once and to bfloat16 once, and the largest
# absolute one where float16 is subnormal.
ROUNDING = 2**-8 + 2**-11
TINY = 2**-24


def require_not_empty(where: str, key: str, tensor: Tensor) -> None:
    """Raises AdapterError for a tensor without numbers.

    Args:
        where: subject of the message, such as "adapter plan (PATH)"; in all functions of this file.
    """
    if tensor.numel() == 0:
        raise AdapterError(
            f"{where}: {key} is empty, its shape is {list(tensor.shape)}",
            "DeepSpeed ZeRO-3 leaves empty tensors if an adapter is saved without gathering its weights: save it with "
            "stage3_gather_16bit_weights_on_model_save, or the state dict that accelerator.get_state_dict gathers.",
        )


def require_lora_shape(where: str, key: str, tensor: Tensor, part: str, owner: str, base: Any) -> None:
    """Checks a LoRA matrix against its module.

    Args:
        part: "lora_A", "lora_B" or another part of a LoRA layer's key.
        owner: FQN of the module.
        base: the base model, a transformers model.

    Raises:
        AdapterError: another number of input or output features.
    """
    module = base.get_submodule(owner)
    sizes = in_out(module)
    if sizes is None or tensor.dim() != 2:
        return
    side = "input" if part.endswith("_A") else "output"
    expected = sizes[0] if side == "input" else sizes[1]
    found = tensor.shape[1] if side == "input" else tensor.shape[0]
    if found == expected:
        return
    if isinstance(module, nn.Embedding) == (side == "input"):
        _refuse_vocabulary(where, key, found, module, base, copied=True)
    raise AdapterError(
        f"{where}: {key} has shape {list(tensor.shape)}, but {owner} of the base has {expected} {side} features",
        "The adapter was trained on another base model; use that one.",
    )


def require_saved_shape(where: str, key: str, tensor: Tensor, owner: str, base: Any) -> None:
    """Raises AdapterError if a module in `modules_to_save` holds a weight of another shape than the base's."""
    module = base.get_submodule(owner)
    weight = getattr(module, key.rpartition(".")[2], None)
    if not isinstance(weight, Tensor) or weight.shape == tensor.shape:
        return
    if weight.shape[1:] == tensor.shape[1:]:
        _refuse_vocabulary(where, key, tensor.shape[0], module, base, copied=False)
    raise AdapterError(
        f"{where}: {key} has shape {list(tensor.shape)}, {owner} of the base has {list(weight.shape)}",
        "The adapter was trained on another base model; use that one.",
    )


def require_base_copy(where: str, key: str, tensor: Tensor, owner: str, base: Any) -> None:
    """Raises AdapterError unless a copy of a base weight equals the base's, which agents share.

    A copy may differ by rounding to bfloat16 and float16: the adapter may have been trained on a base in another dtype.
    """
    module = base.get_submodule(owner)
    weight = getattr(module, key.rpartition(".")[2], None)
    if isinstance(weight, Tensor) and weight.shape == tensor.shape and _equal_once_rounded(weight, tensor):
        return
    if isinstance(weight, Tensor) and weight.shape[1:] == tensor.shape[1:] and weight.shape != tensor.shape:
        _refuse_vocabulary(where, key, tensor.shape[0], module, base, copied=True)
    raise AdapterError(
        f"{where}: {key} differs from the base weight, which agents share",
        "Use the base that it was trained on; list fully trained modules in modules_to_save.",
    )


def _equal_once_rounded(weight: Tensor, copy: Tensor) -> bool:
    if torch.equal(weight, copy.to(weight.dtype)):
        return True
    return torch.allclose(copy.float(), weight.float(), rtol=ROUNDING, atol=TINY)


def _refuse_vocabulary(where: str, key: str, rows: int, module: nn.Module, base: Any, copied: bool) -> None:
    """Raises AdapterError if the module has a row for each token: the adapter has another vocabulary than the base.

    Args:
        rows: the adapter's number of tokens.
        copied: True if the adapter's file holds a copy of the base's enlarged weight, so that the base needs its rows.
    """
    if module is not base.get_input_embeddings() and module is not base.get_output_embeddings():
        return
    size = base.get_input_embeddings().weight.shape[0]
    resize = f"model.resize_token_embeddings({rows})"
    filled = "PeftModel.from_pretrained(model, ADAPTER).unload()" if copied else "model"
    raise AdapterError(
        f"{where}: {key} has {rows} tokens, the vocabulary of the base has {size}",
        f"The adapter was trained on a base with another vocabulary. Resize the base first: load it, {resize}, then "
        f"{filled}.save_pretrained(DIR), save the adapter's tokenizer into DIR too, and use DIR as the model.",
    )
