"""Estimates the memory of a step before the first one: what would fit, and whether layers must be recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lragent.errors import TuneError
from lragent.loading.adapter_hook import Hook
from lragent.loading.model import LoadedModel
from lragent.loading.peft_layers import in_out
from lragent.training.rows import Rows
from lragent.tuning.batches import Batch
from lragent.tuning.loss import CHUNK_NUMBERS
from lragent.tuning.material import Material

GIB = 1 << 30
FLOAT = 4  # bytes
KEPT_IN_A_LAYER = 4.0  # numbers kept in the backward pass of a layer for each output of its linear modules
# The demo's model, 1,158 rows, took 0.85 GiB beyond its weights, where the sum of the parts is 0.5.
SAFETY = 2.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Args:
        layers, hidden: number of layers, and width of what a checkpoint of a layer keeps.
        outputs: outputs of all linear modules of a layer.
        trained: numbers that are trained.
        itemsize: bytes of a number of an activation.
    """

    layers: int
    hidden: int
    outputs: int
    trained: int
    itemsize: int

    def step_bytes(self, rows: Rows) -> int:
        """Estimated bytes of a step over rows: activations, a layer that is computed again, masks, logits, AdamW."""
        count = len(rows.token_ids_N)
        numbers = count * (self.layers * self.hidden + KEPT_IN_A_LAYER * self.outputs)
        masks = max(len(read.queries_n) * len(read.base_L) for read in rows.reads) * (FLOAT + 1)
        return int(SAFETY * (numbers * self.itemsize + masks + 5 * (CHUNK_NUMBERS + self.trained) * FLOAT))

    def activation_bytes(self, rows: Rows) -> int:
        """Estimated bytes of what the backward pass needs of all layers, if none is computed again.

        Adapter-free rows that run apart keep the inputs of their streams only.
        """
        with_gradient = rows if rows.parts is None else rows.parts.others
        numbers = len(with_gradient.token_ids_N) * KEPT_IN_A_LAYER * self.outputs + len(rows.token_ids_N) * self.hidden
        masks = sum(len(read.queries_n) * len(read.base_L) for read in with_gradient.reads)
        return int(SAFETY * self.layers * (numbers + masks) * self.itemsize)

    def teacher_bytes(self, tokens: int) -> int:
        """Bytes of the teacher's last hidden states of so many tokens."""
        return tokens * self.hidden * self.itemsize


def sizes_of(loaded: LoadedModel, trained: int) -> Sizes:
    """Sizes from a model's config and modules."""
    config = loaded.model.config.get_text_config()
    layers = max(1, int(config.num_hidden_layers))
    head = loaded.model.get_output_embeddings()
    outputs = 0
    for module in loaded.model.modules():
        size = in_out(module)
        if size is not None and module is not head and not isinstance(module, (torch.nn.Embedding, Hook)):
            outputs += size[1]
    return Sizes(layers, int(config.hidden_size), outputs // layers, trained, loaded.dtype.itemsize)


def recomputes_layers(material: Material, batches: Sequence[Batch], scheme: str, sizes: Sizes) -> bool:
    """Compares the largest step with the free memory, where the system tells it.

    Returns:
        True if the backward pass must compute layers again, since their activations would take more than half of the
        free memory.

    Raises:
        TuneError: it is too little; names the step, both sizes, and the tokens that would fit.
    """
    free = free_bytes(material.device)
    if free is None:
        return True
    largest = max(batches, key=lambda batch: sum(example.tokens for example in batch.examples))
    tokens = sum(example.tokens for example in largest.examples)
    rows = material.rows(scheme, largest.examples)
    needed = sizes.step_bytes(rows)
    if needed <= free:
        return needed + sizes.activation_bytes(rows) > free / 2
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
