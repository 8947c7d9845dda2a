"""plain_graph: writes into views become values; programs without such writes stay as they were exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lragent.graph.plain_graph import functional, plain_graph


class Writes(nn.Module):
    """Fills a new tensor half by half."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
        out[..., : x.shape[-1]].copy_(x)
        out[..., x.shape[-1] :].copy_(2 * x)
        return out


class Concatenates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, 2 * x], -1)


def test_writes_become_values() -> None:
    x = torch.randn(3, 4)
    graph = plain_graph(functional(torch.export.export(Writes(), (x,))))
    targets = {n.target for n in graph.graph.nodes}
    assert torch.ops.aten.copy_.default not in targets
    torch.testing.assert_close(graph(x), torch.cat([x, 2 * x], -1))


def test_near_miss_a_program_without_writes_is_returned_as_it_is() -> None:
    program = torch.export.export(Concatenates(), (torch.randn(3, 4),))
    assert functional(program) is program
