"""Chooses the attention implementation for a device; an explicit request never falls back to another one."""

from __future__ import annotations

import logging

from lragent.errors import CompilerMissing, RequestError
from lragent.kernels.implementations import FALLBACK, IMPLEMENTATIONS

_LOG = logging.getLogger(__name__)


def graphs(attention: str) -> tuple[str, ...]:
    """Names of the lowered graphs that an implementation consists of."""
    return tuple(graph.name for graph in IMPLEMENTATIONS[attention].graphs)


def require_attention(attention: str, device: str) -> None:
    """Raises RequestError unless an implementation, or "auto", exists for a device; nothing is loaded or built."""
    kind = device.split(":")[0]
    there = [impl.name for impl in IMPLEMENTATIONS.values() if kind in impl.devices]
    hint = f"Use auto, {', '.join(there[:-1])} or {there[-1]}."
    if attention != "auto" and attention not in IMPLEMENTATIONS:
        raise RequestError(f"attention {attention!r} is not available", hint)
    if attention != "auto" and attention not in there:
        raise RequestError(f"attention {attention!r} does not run on {device}", hint)


def resolve(attention: str, device: str) -> str:
    """Name of the implementation for a device, ready to run; "auto" chooses.

    Its kernels are loaded, and built once on a new machine if they are in C++.

    Raises:
        RequestError: unknown, not available on this device, or passed by name and a package that it needs is missing.
        CompilerMissing: passed by name, and its kernels can't be built.
    """
    require_attention(attention, device)
    if attention == "auto":
        return _best(device.split(":")[0])
    load = IMPLEMENTATIONS[attention].load
    if load is not None:
        load()
    return attention


def _best(kind: str) -> str:
    """The first preferred implementation that can be loaded, else `FALLBACK`."""
    for impl in IMPLEMENTATIONS.values():
        if impl.preferred and kind in impl.devices:
            try:
                return resolve(impl.name, kind)
            except (CompilerMissing, RequestError) as error:
                _LOG.warning("attention %s, which is slower: %s", FALLBACK, error.message)
    return FALLBACK
