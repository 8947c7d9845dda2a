"""join_streams: LR columns of several projections of one stream."""

from __future__ import annotations

import torch
from torch import Tensor

from lragent.passes.key_value.join_streams import join, source_order
from lragent.program.cache_schema import CacheSchema, LowRankStream
from tests.passes import tiny_lm as tiny
from tests.passes.key_paths import partial
from tests.passes.stages import allowed, captured, peft_logits, run_cached, run_until
from tests.passes.tiny_lm import DIM, Tiny

IDS = (torch.arange(40) * 7 + 3) % 64


class Latent(tiny.TinyAttention):
    """Half of the key is rotated, half comes from another projection, which also makes the value."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        other = self.gamma(x).unflatten(-1, (tiny.KV_HEADS, DIM))
        self.key_path = lambda k, p, m: torch.cat([partial(k, p, m)[..., :4], other[..., 4:]], -1)
        return super().forward(x, positions)


def test_agents_share_a_block_only_if_they_share_every_a() -> None:
    streams = [LowRankStream("a", (2, 2, 3), (0, 0, 2)), LowRankStream("b", (4, 4, 0), (0, 1, 2))]
    joined = join(streams)
    assert (joined.module, joined.ranks, joined.shares_a_with) == ("a + b", (6, 6, 3), (0, 1, 2))
    assert join([streams[0], LowRankStream("b", (4, 4, 0), (0, 0, 2))]).shares_a_with == (0, 0, 2)


def test_order_puts_each_agents_columns_together() -> None:
    streams = [LowRankStream("a", (2, 2, 3), (0, 0, 2)), LowRankStream("b", (4, 4, 0), (0, 1, 2))]
    # side by side: a0 a0 | a2 a2 a2 | b0 x 4 | b1 x 4
    assert source_order(streams, join(streams)) == [0, 1, 5, 6, 7, 8, 0, 1, 9, 10, 11, 12, 2, 3, 4]


def test_a_key_of_two_projections_over_the_cache_equals_peft() -> None:
    model = Tiny().build()
    for block in model.get_base_model().blocks:
        block.__class__ = Latent
    graph, report, context, state = run_until(captured(model), "attach_cache")
    assert report.misses == ()
    assert [s.ranks for s in state.low_rank_streams] == [(4, 8), (2, 4)] * 2
    schema = CacheSchema("split", context.agents, state.base_streams, state.low_rank_streams)
    for agent_id, agent in enumerate([None, "plan", "action"]):
        found = run_cached(graph, schema, IDS, agent_id, cut=19)
        assert float((found - peft_logits(model, IDS, agent)).abs().max()) <= allowed(model, IDS, agent)
