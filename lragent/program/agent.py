"""One agent of a program: a named adapter, or a spare slot for one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Agent:
    """A named adapter.

    Args:
        digest: sha256 of its weights; "" for a spare slot.
        rank: its largest rank.
        scalings: the different scalings in use, in increasing order.
        targets: FQNs of the modules that it adapts.
    """

    name: str
    digest: str = ""
    rank: int = 0
    scalings: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def spare(self) -> bool:
        """True for a slot without adapter; nobody can act in it."""
        return not self.digest
