"""Length-dependent RoPE (longrope, dynamic): the position limit below which the rotary frequencies are constant.

These kinds choose the frequencies of all tokens of a call by its largest position. A cached key is rotated only once,
so only positions below the first change can be served exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lragent.compat.torch import leaves, map_leaves
from lragent.compat.transformers import forward_with_steady_frequencies
from lragent.probing.bisection import largest
from lragent.probing.position_offset import require_logits_at, takes_positions

# Number of probed tokens; no head dim has this size, so it identifies the token axis.
_TOKENS = 11


def rotary_limit(model: Any, positions: int, offset: int) -> int:
    """Finds the largest number of positions for which the last one does not change the values of earlier ones.

    Runs each module that takes positions and has no weights separately, so that results can be compared to the bit.

    Args:
        positions: number of positions of the model.
        offset: constant that the model adds to positions 0, 1, 2, ...

    Raises:
        ModelError: the model does not run.
    """
    calls = _calls_with_positions(model, offset)
    try:
        return min((_limit_of(call, positions, offset) for call in calls), default=positions)
    finally:
        for call in calls:
            call.run(call.positions)  # modules keep the frequencies of their last call


@contextmanager
def steady_frequencies(model: nn.Module) -> Iterator[None]:
    """Makes rotary modules keep the frequencies of their last call, inside the context."""
    forwards = ((module, forward_with_steady_frequencies(type(module).forward)) for module in model.modules())
    changed = [(module, plain) for module, plain in forwards if plain]
    for module, plain in changed:
        module.forward = MethodType(plain, module)
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward


class _Call:
    """A recorded call of a module, which can be repeated at other positions."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor) -> None:
        self.module, self.args, self.kwargs, self.positions = module, args, kwargs, positions

    def run(self, positions_1T: Tensor) -> list[Tensor]:
        """Repeats the call at `positions_1T`.

        Returns:
            The output tensors. Tensors with a token axis have it first and lack the last token.
        """

        def moved(value: Any) -> Any:
            return positions_1T.expand_as(value) if _is_positions(value, self.positions) else value

        with torch.no_grad():
            out = self.module(*map_leaves(moved, self.args), **map_leaves(moved, self.kwargs))
        tensors = [value for value in leaves(out) if isinstance(value, Tensor)]
        return [t.movedim(t.shape.index(_TOKENS), 0)[:-1].clone() if _TOKENS in t.shape else t.clone() for t in tensors]


def _limit_of(call: _Call, positions: int, offset: int) -> int:
    """Returns the largest number of positions for which the last one does not change the values of earlier ones."""

    def with_last(last: int) -> Tensor:
        return torch.tensor([[*range(_TOKENS - 1), last]]) + offset

    fewest = min(_TOKENS, positions)
    expected = call.run(with_last(fewest - 1))

    def same(count: int) -> bool:
        return all(map(torch.equal, expected, call.run(with_last(count - 1))))

    if same(positions):
        return positions
    return largest(same, fewest, positions)


def _calls_with_positions(model: Any, offset: int) -> list[_Call]:
    """Records the calls of modules that take the positions and have no weights, in one forward over a few tokens."""
    positions = torch.arange(_TOKENS)[None] + offset
    calls: list[_Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = any(_is_positions(value, positions) for value in leaves((args, kwargs)))
        if given and next(module.parameters(), None) is None:
            calls.append(_Call(module, args, kwargs, positions))

    if not takes_positions(model):
        return []
    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        require_logits_at(model, torch.zeros_like(positions), positions)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _is_positions(value: Any, positions_1T: Tensor) -> bool:
    """True if a value is a tensor of the positions, possibly broadcast."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        return False
    return value.dim() > 0 and value.shape[-1] == _TOKENS and bool((value == positions_1T).all())
