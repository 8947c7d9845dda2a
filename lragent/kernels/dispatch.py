"""Which attention implementation runs where; an explicit request never falls back to another one."""

from __future__ import annotations

from lragent.errors import RequestError

# Implementation -> devices it runs on.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "reference": ("cpu", "cuda"),
    "torch": ("cpu", "cuda"),
}


def resolve(attention: str, device: str) -> str:
    """Name of the implementation for a device; "auto" chooses.

    Raises:
        RequestError: unknown, or not available on this device.
    """
    if attention == "auto":
        return "torch"
    if attention not in IMPLEMENTATIONS:
        raise RequestError(f"attention {attention!r} is not available", f"Use auto, {', '.join(IMPLEMENTATIONS)}.")
    if device.split(":")[0] not in IMPLEMENTATIONS[attention]:
        raise RequestError(f"attention {attention!r} does not run on {device}", "Use attention auto.")
    return attention
