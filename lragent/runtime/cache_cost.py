"""Bytes of cache a token under each sharing scheme, and from how many agents on sharing takes less than not sharing.

Split schemes hold a token's base streams once and the LR columns of all acting agents; `non_shared` holds the base
streams once for each agent that has seen the token. With many agents, high ranks or few KV heads, the columns cost more
than they save unless many agents see every token.
"""

from __future__ import annotations

from collections.abc import Mapping

from lragent.program.cache_schema import CacheSchema
from lragent.program.dtypes import dtype_named
from lragent.runtime.schemes import SCHEMES


def bytes_per_token(
    schemas: Mapping[str, CacheSchema], names: tuple[str, ...], dtype: str
) -> dict[str, tuple[int, ...]]:
    """The formulas of the sharing schemes: base numbers once (or once an agent), LR columns as a scheme holds them.

    Args:
        names: agents that act, in the schemas' order.
    """
    size = dtype_named(dtype).itemsize
    result: dict[str, tuple[int, ...]] = {}
    for name, scheme in SCHEMES.items():
        schema = schemas.get(scheme.layout)
        if schema is None:
            continue
        schema = schema.holding(names)
        base, acting = schema.base_numbers_per_token(), [schema.agents.index(name) for name in names]
        lr = [schema.lr_numbers_per_token(agent, scheme.lr_blocks) for agent in acting]
        counts = []
        for seen in range(1, max(len(acting), 1) + 1):
            held = sum(lr[:seen]) if scheme.own_lr_only else sum(lr)
            counts.append(size * (base * seen if scheme.page_table_per_agent else base + held))
        result[name] = tuple(counts)
    return result


def break_even(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
    """Split scheme -> how many agents must see a token so that it takes less than in `non_shared`; None: never.

    Args:
        sizes: what `bytes_per_token` returns.
    """
    alone = sizes["non_shared"]
    return {
        name: next((n for n, (ours, theirs) in enumerate(zip(held, alone, strict=True), 1) if ours < theirs), None)
        for name, held in sizes.items()
        if SCHEMES[name].layout == "split"
    }


def advice(sizes: Mapping[str, tuple[int, ...]]) -> str:
    """What to say of `base_lr_shared` where it saves memory late or never; "" where it saves early."""
    held, alone = sizes.get("base_lr_shared"), sizes["non_shared"]
    if held is None or len(held) < 2:
        return ""
    least = break_even(sizes)["base_lr_shared"]
    if least is not None and least <= max(2, len(held) // 2):
        return ""
    when = "never" if least is None else f"only once {least} of {len(held)} agents have seen a token"
    return (
        f"base_lr_shared takes less cache than non_shared {when}: {held[-1]} bytes a token against {alone[-1]} with all"
        " agents. Lower ranks, fewer adapters on keys and values, or one A for all would help; load(agents=[...]) holds"
        " columns only of agents that a run uses."
    )
