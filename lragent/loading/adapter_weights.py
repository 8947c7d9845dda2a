"""Weights of one adapter on one module, in one of two forms that cover all supported LoRA variants:

    LoraWeights      y = gain * (base(x) + scaling * B A x) + constant       rsLoRA, DoRA, biases, embeddings
    ReplacedRows     y[i] = weight_i x + bias_i for some i, else base(x)[i]  modules_to_save, trainable tokens

`base(x)` is the module without adapter, including its bias. For an embedding, x is one-hot: A x is a column of A, and
replaced row i is the row of token i.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.errors import AdapterError


@dataclass(frozen=True)
class LoraWeights:
    """Low-rank form: y = gain * (base(x) + scaling * B A x) + constant. Tensors have the dtype of the base weight.

    Args:
        a: `[r, in]`.
        b: `[out, r]`.
        gain: `[out]`, DoRA's magnitude divided by the norm of the adapted weight; None: 1.
        constant: `[out]`, from trained biases and, for DoRA, (1 - gain) * base bias; None: 0.
    """

    a: Tensor
    b: Tensor
    scaling: float
    gain: Tensor | None = None
    constant: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class ReplacedRows:
    """Weight rows that replace rows of the base.

    Args:
        index: `[K]` int64, replaced outputs; for an embedding, tokens.
        weight: `[K, in]`; for an embedding, `[K, out]`.
        bias: `[K]`; None: the module has no bias.
    """

    index: Tensor
    weight: Tensor
    bias: Tensor | None = None


def is_finite(tensor: Tensor) -> bool:
    """True if no value is infinite or NaN. Uses the extremes, which needs no mask of the tensor's size."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax())


def require_finite(where: str, weights: LoraWeights | ReplacedRows) -> None:
    """Raises AdapterError if a weight or the scaling is infinite or NaN.

    Args:
        where: subject of the message, such as "adapter plan: module FQN".
    """
    names = {"a": "lora_A", "b": "lora_B"}
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if value is not None and not (is_finite(value) if isinstance(value, Tensor) else math.isfinite(value)):
            raise AdapterError(
                f"{where} has infinite values or NaN as its {names.get(field.name, field.name)}",
                "Save it again; if this dtype is float16, choose another.",
            )


def dora_gain(weight_OI: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude_O: Tensor) -> Tensor:
    """DoRA's gain `[out]`: magnitude / norm of W + scaling * B A over the inputs, computed in at least float32.

    Args:
        weight_OI: base weight `[out, in]`; the result has its dtype.
        a: `[r, in]`.
        b: `[out, r]`.
        magnitude_O: DoRA's magnitude vector, `[out]` up to axes of size 1.
    """
    wide = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    adapted = weight_OI.to(wide) + scaling * (b.to(wide) @ a.to(wide))
    gain: Tensor = magnitude_O.to(wide).reshape(-1) / torch.linalg.norm(adapted, dim=1)
    return gain.to(weight_OI.dtype)


def digest(lora: Mapping[str, LoraWeights], rows: Mapping[str, ReplacedRows]) -> str:
    """sha256 of an adapter's weights and scalings, independent of its name.

    Args:
        lora: module FQN -> weights.
        rows: module FQN -> replaced rows.
    """
    sha = hashlib.sha256()
    for module in sorted(lora):
        pair = lora[module]
        add_tensors(sha, f"{module} {pair.scaling!r}", (pair.a, pair.b))
        if pair.gain is not None or pair.constant is not None:
            add_tensors(sha, "gain and constant", (pair.gain, pair.constant))
    for module in sorted(rows):
        add_tensors(sha, f"{module} rows", (rows[module].index, rows[module].weight, rows[module].bias))
    return sha.hexdigest()


def add_tensors(sha: hashlib._Hash, label: str, tensors: Iterable[Tensor | None]) -> None:
    """Adds a label and tensors to a hash, each with dtype and shape; None counts, too."""
    sha.update(label.encode())
    for tensor in tensors:
        if tensor is None:
            sha.update(b"none")
            continue
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
