"""Bytes of cache per token under each sharing scheme, and the number of agents from which on sharing saves memory.

Split schemes store the base streams of a token once, and the LR values of all acting agents. `non_shared` stores the
base streams once per agent that has seen the token. With many agents, high ranks or few KV heads, sharing saves memory
only if many agents see every token.
"""

from __future__ import annotations

from collections.abc import Mapping

from lragent.program.cache_schema import CacheSchema
from lragent.program.dtypes import dtype_named
from lragent.runtime.schemes import SCHEMES


def bytes_per_token(
    schemas: Mapping[str, CacheSchema], names: tuple[str, ...], dtype: str
) -> dict[str, tuple[int, ...]]:
    """By scheme whose layout is in `schemas`, bytes per token once 1, 2, ... acting agents have seen the token.

    Args:
        names: acting agents, in the order of the schemas.
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
    """By split scheme, the number of agents that must see a token before it takes less than `non_shared`; None: never.

    Args:
        sizes: result of `bytes_per_token`.
    """
    alone = sizes["non_shared"]
    return {
        name: next((n for n, (ours, theirs) in enumerate(zip(held, alone, strict=True), 1) if ours < theirs), None)
        for name, held in sizes.items()
        if SCHEMES[name].layout == "split"
    }


def advice(sizes: Mapping[str, tuple[int, ...]]) -> str:
    """A hint for users if `base_lr_shared` saves memory late or never; "" if it saves memory early."""
    held, alone = sizes.get("base_lr_shared"), sizes["non_shared"]
    if held is None or len(held) < 2:
        return ""
    least = break_even(sizes)["base_lr_shared"]
    if least is not None and least <= max(2, len(held) // 2):
        return ""
    when = "never" if least is None else f"only once {least} of {len(held)} agents have seen a token"
    return (
        f"base_lr_shared takes less cache than non_shared {when}: {held[-1]} bytes per token against {alone[-1]} with"
        " all agents. Lower ranks, fewer adapters on keys and values, or one A for all would help; load(agents=[...])"
        " stores LR values only of agents that a run uses."
    )
