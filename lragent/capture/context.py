"""The context of capture's passes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CaptureContext:
    """Facts of the loaded model.

    Args:
        max_positions: number of positions that the model serves.
    """

    max_positions: int
