"""Facts that passes of capture read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CaptureContext:
    """Facts of the loaded model: how many positions it serves."""

    max_positions: int
