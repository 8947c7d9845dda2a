"""Computes the constants of a rewritten graph from adapters (`lragent.program.adapter_map`); gradients pass through.

Legend: N = agents, H = KV heads, D = head dim, C = channels of the projections behind one K or V, r = rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lragent.passes.adapters.stack import stack
from lragent.passes.contract import Adapter
from lragent.program.adapter_map import AdapterMap, AttentionConstant, HeadMap

Adapters = Mapping[str, Mapping[str, Adapter]]  # module FQN -> agent name -> weights


def constants_of(adapter_map: AdapterMap, agents: tuple[str, ...], adapters: Adapters) -> dict[str, Tensor]:
    """The constants by name.

    Args:
        agents: names in order; agent id = index + 1.
        adapters: weights on every module of the map; an agent without an adapter on a module is left out there.
    """
    constants: dict[str, Tensor] = {}
    for routed in adapter_map.routed:
        a_cat, b_cat, _, _, ones = stack(routed.stream, agents, adapters[routed.stream.module])
        constants[routed.a] = a_cat.T if routed.embeds else a_cat
        constants[routed.b] = b_cat
        if ones is not None:
            constants[routed.ones] = ones
    for constant in adapter_map.attention:
        constants[constant.name] = attention_b(constant, agents, adapters)
    return constants


def attention_b(constant: AttentionConstant, agents: Sequence[str], adapters: Adapters) -> Tensor:
    """B per agent and head, `[N + 1, H, r, D]`; row 0 (base) and rows past an agent's rank are zero."""
    blocks: list[Tensor | None] = [None]
    for agent in agents:
        parts: list[Tensor] = []
        for module, start in zip(constant.modules, constant.starts, strict=True):
            found = adapters[module].get(agent)
            if found is not None:
                after = constant.channels - start - found.b.shape[0]
                parts.append(torch.nn.functional.pad(found.b.T, (start, after)))
        blocks.append(to_heads(constant.heads, torch.cat(parts)).transpose(0, 1) if parts else None)
    some = next(block for block in blocks if block is not None)
    rank = max(block.shape[1] for block in blocks if block is not None)
    zero = some.new_zeros(some.shape[0], rank, some.shape[2])
    padded = [
        zero if block is None else torch.nn.functional.pad(block, (0, 0, 0, rank - block.shape[1])) for block in blocks
    ]
    return torch.nn.functional.pad(torch.stack(padded), (0, constant.padding))


def to_heads(heads: HeadMap, rows_nC: Tensor) -> Tensor:
    """Applies a map to rows: `[n, C] -> [n, H, D]` in the rows' dtype."""
    if heads.dense_CHD is not None:
        return torch.einsum("nc,chd->nhd", rows_nC, heads.dense_CHD.to(rows_nC.dtype))
    assert heads.channel_HD is not None
    picked = rows_nC[:, heads.channel_HD]
    return picked if heads.factor_HD is None else picked * heads.factor_HD.to(rows_nC.dtype)
