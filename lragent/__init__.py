"""LRAgent: one KV cache for all LoRA agents of a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lragent.api import convert, inspect, load, optimize, update
    from lragent.build_artifact import ConvertReport
    from lragent.inspection import Inspection
    from lragent.runtime.engine import Engine
    from lragent.runtime.rollout import RolloutResult
    from lragent.runtime.trajectory import Trajectory
    from lragent.runtime.turn import Turn

__all__ = [
    "ConvertReport",
    "Engine",
    "Inspection",
    "RolloutResult",
    "Trajectory",
    "Turn",
    "convert",
    "inspect",
    "load",
    "optimize",
    "update",
]

_HOMES = {
    "ConvertReport": "lragent.build_artifact",
    "Engine": "lragent.runtime.engine",
    "Inspection": "lragent.inspection",
    "RolloutResult": "lragent.runtime.rollout",
    "Trajectory": "lragent.runtime.trajectory",
    "Turn": "lragent.runtime.turn",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import lragent` alone stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'lragent' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "lragent.api")), name)
