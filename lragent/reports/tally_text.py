"""A tally as text, for tables."""

from __future__ import annotations

from lragent.program.drift import Tally


def show_tally(tally: Tally) -> str:
    """`0.012 (97.5%, 240)`: KL per token, agreement of the most likely token, tokens."""
    return f"{tally.mean_kl:.2g} ({tally.agreement:.1%}, {tally.tokens})"
