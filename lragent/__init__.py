"""LRAgent: one KV cache for all LoRA agents of a model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lragent.api import convert, inspect, load, optimize

__all__ = ["convert", "inspect", "load", "optimize"]


def __getattr__(name: str) -> Any:
    """Entry points are imported when first used: `import lragent` alone stays light."""
    if name in __all__:
        from lragent import api

        return getattr(api, name)
    raise AttributeError(f"module 'lragent' has no attribute {name!r}")
