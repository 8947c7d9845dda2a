"""Cache writes as index operations, without a loop over tokens.

Legend: T = tokens, H = KV heads, Dk / Dv = head dims, P = tokens a page, N = agents, R = columns of `x @ A_cat.T`.

Slots are `page * P + offset`. Slots of the scratch page (page 0) may repeat; what lands there is one of the values
written and never read.
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
    """Writes each owning agent's columns into its block of the flat `lr_cache`.

    A block reaches from its offset to the next owner's offset (or to the end of the tensor), so that its number of
    rows follows from the table, and a slot outside the block raises instead of landing in a neighbour's.

    Raises:
        IndexError: a slot lies outside the cache.
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
