"""Chooses the attention implementation for a device; an explicit request never falls back to another one."""

from __future__ import annotations

import logging

from lragent.errors import CompilerMissing, RequestError
from lragent.kernels.implementations import FALLBACK, IMPLEMENTATIONS

_LOG = logging.getLogger(__name__)


def graphs(attention: str) -> tuple[str, ...]:
    """Names of the lowered graphs of an implementation."""
    return tuple(graph.name for graph in IMPLEMENTATIONS[attention].graphs)


def require_attention(attention: str, device: str) -> None:
    """Checks that an implementation, or "auto", exists for a device. Loads and builds nothing.

    Raises:
        RequestError: it does not exist, or not for this device.
    """
    kind = device.split(":")[0]
    available = [impl.name for impl in IMPLEMENTATIONS.values() if kind in impl.devices]
    hint = f"Use auto, {', '.join(available[:-1])} or {available[-1]}."
    if attention != "auto" and attention not in IMPLEMENTATIONS:
        raise RequestError(f"attention {attention!r} is not available", hint)
    if attention != "auto" and attention not in available:
        raise RequestError(f"attention {attention!r} does not run on {device}", hint)


def resolve(attention: str, device: str) -> str:
    """Loads an implementation for a device and returns its name; "auto" chooses one.

    C++ kernels are built first if this machine has no library of them yet.

    Raises:
        RequestError: it is unknown, does not run on this device, or was passed by name and a package is missing.
        CompilerMissing: it was passed by name, and its kernels can't be built.
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
                _LOG.warning("using attention %s, which is slower: %s", FALLBACK, error.message)
    return FALLBACK
