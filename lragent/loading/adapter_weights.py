"""What one adapter does to one module, whichever LoRA variant it was trained as.

Every variant is brought into one of two forms:

    LoraWeights      y = gain * (base(x) + scaling * B A x) + constant       rsLoRA, DoRA, biases, embeddings
    ReplacedRows     y[i] = weight_i x + bias_i for some i, else base(x)[i]  modules_to_save, trainable tokens

`base(x)` is the module without adapter, its bias included. For an embedding, x is one-hot: A x is a column of A, and a
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
    """Low-rank form: A `[r, in]`, B `[out, r]`.

    Args:
        gain: DoRA's magnitude over the norm of the adapted weight, `[out]`; None: 1.
        constant: a trained bias, and what DoRA keeps out of the base's bias, `[out]`; None: 0.
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
    """Outputs (for an embedding: tokens) `index` `[K]` with rows of their own: `weight [K, in]`, `bias [K]` or None."""

    index: Tensor
    weight: Tensor
    bias: Tensor | None = None


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN; without a mask as large as the tensor."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax())


def require_finite(where: str, weights: LoraWeights | ReplacedRows) -> None:
    """Raises AdapterError if a weight or the scaling is infinite or NaN; `where` begins the message."""
    names = {"a": "lora_A", "b": "lora_B"}
    for field in dataclasses.fields(weights):
        value = getattr(weights, field.name)
        if value is not None and not (is_finite(value) if isinstance(value, Tensor) else math.isfinite(value)):
            raise AdapterError(
                f"{where} has infinite values or NaN as its {names.get(field.name, field.name)}",
                "Save it again; if this dtype is float16, choose another.",
            )


def dora_gain(weight_OI: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude_O: Tensor) -> Tensor:
    """DoRA's factor of each output: magnitude / |W + scaling B A| over the inputs."""
    wide = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    adapted = weight_OI.to(wide) + scaling * (b.to(wide) @ a.to(wide))
    gain: Tensor = magnitude_O.to(wide).reshape(-1) / torch.linalg.norm(adapted, dim=1)
    return gain.to(weight_OI.dtype)


def digest(lora: Mapping[str, LoraWeights], rows: Mapping[str, ReplacedRows]) -> str:
    """sha256 over an adapter's weights and scalings by module, independent of its name."""
    sha = hashlib.sha256()
    for module in sorted(lora):
        pair = lora[module]
        _add(sha, f"{module} {pair.scaling!r}", (pair.a, pair.b))
        if pair.gain is not None or pair.constant is not None:
            _add(sha, "gain and constant", (pair.gain, pair.constant))
    for module in sorted(rows):
        _add(sha, f"{module} rows", (rows[module].index, rows[module].weight, rows[module].bias))
    return sha.hexdigest()


def _add(sha: hashlib._Hash, label: str, tensors: Iterable[Tensor | None]) -> None:
    sha.update(label.encode())
    for tensor in tensors:
        if tensor is None:
            sha.update(b"none")
            continue
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
