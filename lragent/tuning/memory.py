"""Estimates the memory of a step before the first one: what would fit, and whether layers must be recomputed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lragent.errors import TuneError
from lragent.loading.adapter_hook import Hook
from lragent.loading.model import LoadedModel
from lragent.loading.peft_layers import in_out
from lragent.training.rows import Rows
from lragent.training.shared_model import SharedModel
from lragent.tuning.batches import Batch
from lragent.tuning.loss import CHUNK_NUMBERS
from lragent.tuning.material import Material

GIB = 1 << 30
FLOAT = 4  # bytes
KEPT_IN_A_LAYER = 4.0  # numbers kept in the backward pass of a layer for each output of its linear modules
SCORES = 4  # tensors of the size of attention scores that a backward pass keeps: scores, capped, weights, gradient
EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")
# The demo's model, 1,158 rows, took 0.85 GiB beyond its weights, where the sum of the parts is 0.5.
SAFETY = 2.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Args:
        layers, hidden: number of layers, and width of what a checkpoint of a layer keeps.
        outputs: outputs of all linear modules of a layer.
        key_value: numbers of K and V of a token in a layer.
        experts: weights of the experts that a token of a layer selects; they are gathered for each token.
        pair_bytes: bytes that attention keeps for a query and a position.
        trained: numbers that are trained.
        itemsize: bytes of a number of an activation.
    """

    layers: int
    hidden: int
    outputs: int
    key_value: int
    experts: int
    pair_bytes: int
    trained: int
    itemsize: int

    def step_bytes(self, rows: Rows) -> int:
        """Estimated bytes of a step over rows: states between layers, a layer that is computed again, logits, AdamW."""
        between = len(rows.token_ids_N) * self.hidden + self._streams_of_free(rows)
        others = 5 * (CHUNK_NUMBERS + self.trained) * FLOAT
        return int(SAFETY * (self.layers * between * self.itemsize + self._layer_bytes(rows) + others))

    def activation_bytes(self, rows: Rows) -> int:
        """Estimated bytes of what the backward pass needs of all layers, if none is computed again.

        Adapter-free rows that run apart keep their streams and the inputs of those only.
        """
        between = len(rows.token_ids_N) * self.hidden + self._streams_of_free(rows)
        return int(SAFETY * self.layers * (between * self.itemsize + self._layer_bytes(rows)))

    def _layer_bytes(self, rows: Rows) -> float:
        """Bytes that the backward pass of one layer needs."""
        others = rows if rows.parts is None else rows.parts.others
        numbers = len(others.token_ids_N) * (KEPT_IN_A_LAYER * self.outputs + self.experts)
        numbers += sum(len(read.base_L) for read in others.reads) * self.key_value
        pairs = sum(len(read.queries_n) * len(read.base_L) for read in others.reads)
        return numbers * self.itemsize + pairs * self.pair_bytes

    def _streams_of_free(self, rows: Rows) -> int:
        """Numbers of K and V in a layer that adapter-free rows leave for the others."""
        return 0 if rows.parts is None else len(rows.parts.free.token_ids_N) * self.key_value

    def teacher_bytes(self, tokens: int) -> int:
        """Bytes of the teacher's last hidden states of so many tokens."""
        return tokens * self.hidden * self.itemsize


def sizes_of(loaded: LoadedModel, model: SharedModel, trained: int) -> Sizes:
    """Sizes from a model's config, modules, and graph."""
    config = loaded.model.config.get_text_config()
    layers = max(1, int(config.num_hidden_layers))
    head = loaded.model.get_output_embeddings()
    outputs = 0
    for module in loaded.model.modules():
        size = in_out(module)
        if size is not None and module is not head and not isinstance(module, (torch.nn.Embedding, Hook)):
            outputs += size[1]
    kv_heads = max((layer.kv_heads for layer in model.schema.base), default=1)
    heads = _largest(getattr(config, "num_attention_heads", None)) or kv_heads
    return Sizes(
        layers=layers,
        hidden=int(config.hidden_size),
        outputs=outputs // layers,
        key_value=model.schema.base_numbers_per_token() // max(1, len(model.schema.base)),
        experts=_selected_experts(loaded),
        pair_bytes=SCORES * heads * FLOAT if model.holds_scores else FLOAT + 1,
        trained=trained,
        itemsize=loaded.dtype.itemsize,
    )


def _selected_experts(loaded: LoadedModel) -> int:
    """Weights of the experts that a token selects in the largest layer; 0 without fused experts."""
    config = loaded.model.config.get_text_config()
    chosen = next((n for name in EXPERTS_A_TOKEN if (n := _largest(getattr(config, name, None)))), 0)
    largest = 0
    for module in loaded.model.modules():
        fused = [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]
        if fused:
            count = chosen or fused[0].shape[0]
            largest = max(largest, count * sum(weight[0].numel() for weight in fused))
    return largest


def _largest(value: object) -> int:
    """An entry of a config that is one number, or one by layer; 0 if it is neither."""
    numbers = value if isinstance(value, Sequence) else (value,)
    return max((number for number in numbers if isinstance(number, int)), default=0)


def recomputes_layers(
    material: Material, batches: Sequence[Batch], compared: Collection[int], scheme: str, sizes: Sizes
) -> bool:
    """Compares the largest step with the free memory, where the system tells it.

    Args:
        compared: indices of the examples whose teacher's states may be kept.

    Returns:
        True if the backward pass must compute layers again, since their activations would take more than half of the
        free memory.

    Raises:
        TuneError: it is too little; names the step, both sizes, and the tokens that would fit.
    """
    free = free_bytes(material.device)
    if free is None:
        return True
    fullest = max(batches, key=lambda batch: sum(example.tokens for example in batch.examples))
    longest_one = max(batches, key=lambda batch: max(example.tokens for example in batch.examples))
    rows, largest = max(
        ((material.rows(scheme, batch.examples), batch) for batch in (fullest, longest_one)),
        key=lambda pair: sizes.step_bytes(pair[0]),
    )
    tokens = sum(example.tokens for example in largest.examples)
    needed = sizes.step_bytes(rows)
    if needed <= free:
        states = sizes.teacher_bytes(sum(len(material.examples[index].generated) for index in compared))
        return needed + sizes.activation_bytes(rows) + states > free / 2
    fitting = int(tokens * free / needed)
    longest = max(largest.examples, key=lambda example: example.tokens)
    remedy = f"Use --batch-tokens {max(fitting, 1)}."
    if longest.tokens > fitting:
        remedy = f"Leave out trajectories above {fitting} tokens, such as {longest.place} with {longest.tokens}."
    raise TuneError(
        f"a step of {tokens} tokens under {scheme} needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free; "
        f"about {fitting} tokens would fit",
        remedy,
    )


def require_teacher_memory(material: Material, compared: Sequence[int], sizes: Sizes) -> None:
    """Compares the teacher's states with the free memory of the CPU, where the system tells it.

    Args:
        compared: indices of the examples that are compared with the teacher.

    Raises:
        TuneError: it is too little; names tokens and both sizes.
    """
    free = free_bytes(torch.device("cpu"))
    tokens = sum(len(material.examples[index].generated) for index in compared)
    needed = sizes.teacher_bytes(tokens)
    if free is not None and needed > free:
        raise TuneError(
            f"the agents' hidden states of {tokens} tokens need {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free",
            "Give fewer trajectories, or leave appended tokens out of the loss (--appended-kl 0).",
        )


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where the system doesn't tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
