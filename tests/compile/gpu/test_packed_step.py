"""Step inputs in one buffer: what comes out is what went in, padded with what nobody reads."""

from __future__ import annotations

import torch

from lragent.compile.export import example_step
from lragent.compile.gpu.packed_step import (
    ALIGNMENT,
    LEAST_PAGES_PER_SEQ,
    StepSizes,
    pack,
    padded,
    rounded_up,
    sizes_of,
    views,
)
from lragent.program.step import STEP_INPUTS, StepInputs

AGENTS = 3


def _random_step(sequences: int, tokens: int) -> StepInputs:
    step = example_step(AGENTS, sequences, tokens)
    return StepInputs(*(torch.randint(1, 1000, part.shape) for part in step.tensors()))


def test_what_is_packed_comes_out_at_aligned_places() -> None:
    step = _random_step(5, 3)
    sizes = sizes_of(step)
    buffer = torch.full((sizes.numbers() + 4,), -1)
    pack(step, buffer, sizes)
    found = views(buffer, sizes)
    for name, part, given in zip(STEP_INPUTS, found, step.tensors(), strict=True):
        assert torch.equal(part, given), name
        assert part.storage_offset() % ALIGNMENT == 0 and part.is_contiguous(), name
    assert buffer[sizes.numbers() :].tolist() == [-1] * 4


def test_padding_is_scratch_and_empty() -> None:
    step = _random_step(5, 3)
    sizes = padded(sizes_of(step))
    assert (sizes.tokens, sizes.sequences, sizes.pages_per_seq, sizes.rows) == (16, 5, LEAST_PAGES_PER_SEQ, 5)
    buffer = torch.full((sizes.numbers(),), -1)
    pack(step, buffer, sizes)
    found = StepInputs(*views(buffer, sizes))
    assert found.seq_starts.tolist() == step.seq_starts.tolist()
    assert found.lr_slots[:, 15:].tolist() == [[0]] * AGENTS
    assert found.base_slots.tolist() == [*step.base_slots.tolist(), 0]
    assert torch.equal(found.page_table[:, :4], step.page_table) and not found.page_table[:, 4:].any()
    sizes = padded(sizes_of(_random_step(9, 3)))
    assert (sizes.tokens, sizes.sequences) == (28, 10)


def test_empty_sequences_start_where_tokens_end() -> None:
    step = _random_step(9, 1)
    sizes = padded(sizes_of(step))
    assert sizes.tokens == sizes.sequences == 10
    buffer = torch.empty(sizes.numbers(), dtype=torch.int64)
    pack(step, buffer, sizes)
    found = StepInputs(*views(buffer, sizes))
    assert found.seq_starts[10] == 9 and torch.equal(found.seq_starts[:10], step.seq_starts)
    assert found.context_lens.tolist() == [*step.context_lens.tolist(), 0]


def test_a_mixed_step_never_looks_like_decodes_and_has_room_for_its_tokens() -> None:
    for sequences in range(1, 40):
        for more in range(1, 40):
            mixed = padded(StepSizes(sequences + more, sequences, 4, sequences, AGENTS))
            assert mixed.tokens > mixed.sequences >= sequences and mixed.tokens >= sequences + more


def test_few_sizes() -> None:
    assert [rounded_up(n) for n in (1, 7, 8, 9, 17, 33, 1000, 1024)] == [1, 7, 8, 10, 20, 40, 1024, 1024]
    assert all(n <= rounded_up(n) <= 1.25 * n for n in range(1, 5000))
    # One to seven, four an octave from there on, and 1,024.
    assert len({rounded_up(n) for n in range(1, 1025)}) == 7 + 4 * 7 + 1
