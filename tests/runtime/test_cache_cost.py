"""break_even: from how many agents on a token shared by columns takes less than a token kept by each."""

from __future__ import annotations

from lragent.program.cache_schema import BaseStreams, CacheSchema, LowRankStream
from lragent.runtime.cache_cost import advice, break_even, bytes_per_token


def _sizes(agents: int, rank: int, shared_a: bool = False, acting: int | None = None) -> dict[str, tuple[int, ...]]:
    """One layer of 2 heads of 8 for K and V (32 numbers), adapters on V, float32."""
    names = tuple(f"agent{i}" for i in range(agents))
    group = (0,) * agents if shared_a else tuple(range(agents))
    base = (BaseStreams(0, 2, 8, 8),)
    stream = LowRankStream("v", (rank,) * agents, group)
    schemas = {"split": CacheSchema("split", names, base, (stream,)), "dense": CacheSchema("dense", names, base, ())}
    return bytes_per_token(schemas, names[:acting], "float32")


def test_bytes_by_agents_that_have_seen_a_token() -> None:
    sizes = _sizes(3, 4)
    assert sizes["non_shared"] == (128, 256, 384)
    assert sizes["base_lr_shared"] == sizes["neutral_shared"] == (176, 176, 176)
    assert sizes["base_shared"] == (144, 160, 176)
    assert break_even(sizes) == dict.fromkeys(("base_shared", "base_lr_shared", "rebase_shared", "neutral_shared"), 2)
    assert advice(sizes) == ""


def test_columns_of_many_agents_pay_late() -> None:
    """32 agents of rank 8: 256 numbers of columns beside 32 of base streams."""
    sizes = _sizes(32, 8)
    assert break_even(sizes)["base_lr_shared"] == 10  # 32 + 256 < 10 * 32
    assert advice(sizes) == ""  # less than half of them
    late = _sizes(32, 24)
    assert break_even(late)["base_lr_shared"] == 26
    assert "only once 26 of 32 agents have seen a token: 3200 bytes per token against 4096" in advice(late)


def test_columns_wider_than_the_base_never_pay() -> None:
    sizes = _sizes(4, 40)
    assert break_even(sizes)["base_lr_shared"] is None
    assert "never: 768 bytes per token against 512" in advice(sizes)


def test_a_shared_a_or_fewer_acting_agents_pay_early() -> None:
    assert break_even(_sizes(32, 24, shared_a=True))["base_lr_shared"] == 2
    assert break_even(_sizes(32, 24, acting=3))["base_lr_shared"] is None
    assert _sizes(32, 8, acting=3)["base_lr_shared"] == (224, 224, 224)


def test_one_agent_has_nothing_to_share() -> None:
    assert advice(_sizes(1, 4)) == ""
