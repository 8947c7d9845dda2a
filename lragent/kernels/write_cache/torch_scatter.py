"""Cache writes in plain PyTorch, as index operations without a loop over tokens.

Legend: T = tokens, H = KV heads, Dk / Dv = head dims, P = tokens per page, N = agents, R = width of the LR stream
`x @ A_cat.T`.

Slots are `page * P + offset`. Slots of the scratch page (page 0) may repeat: one of the values is stored and never
read.
"""

from __future__ import annotations

from torch import Tensor

from lragent.program.cache_schema import LR_OFFSET, LR_RANK, LR_SOURCE, LR_WRITES


def write_kv(key_THDk: Tensor, value_THDv: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor) -> None:
    """Writes base K and V into `k_cache [pages, H, P, Dk]` and `v_cache [pages, H, P, Dv]`, cast to their dtypes."""
    page_size = k_cache.shape[2]
    pages_T, offsets_T = slots_T // page_size, slots_T % page_size
    k_cache[pages_T, :, offsets_T] = key_THDk.to(k_cache.dtype)
    v_cache[pages_T, :, offsets_T] = value_THDv.to(v_cache.dtype)


def write_lr(lr_TR: Tensor, lr_cache: Tensor, lr_table: Tensor, slots_NT: Tensor) -> None:
    """Writes the LR stream into the LR block of every agent whose `writes` flag is set; `lr_cache` is flat.

    A block ends where the next block starts, or at the end of the tensor. Its number of rows follows from that, so a
    slot outside the block raises an error instead of overwriting another block.

    Raises:
        IndexError: a slot is outside the cache.
    """
    rows = lr_table.tolist()
    offsets = [row[LR_OFFSET] for row in rows if row[LR_WRITES]]
    for agent, row in enumerate(rows[1:]):
        if not row[LR_WRITES]:
            continue
        start, rank, source = row[LR_OFFSET], row[LR_RANK], row[LR_SOURCE]
        end = min((offset for offset in offsets if offset > start), default=lr_cache.numel())
        block = lr_cache[start:end].view(-1, rank)
        block.index_copy_(0, slots_NT[agent], lr_TR[:, source : source + rank].to(lr_cache.dtype))
