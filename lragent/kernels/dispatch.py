"""Which attention implementation runs where; an explicit request never falls back to another one."""

from __future__ import annotations

import logging

from lragent.errors import CompilerMissing, RequestError
from lragent.kernels import cpp_library, triton_library

_LOG = logging.getLogger(__name__)

# Implementation -> devices it runs on.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "reference": ("cpu", "cuda"),
    "torch": ("cpu", "cuda"),
    "inductor": ("cpu", "cuda"),
    "cpp": ("cpu",),
    "triton": ("cuda",),
}
# Runs the layers that the chosen implementation can't.
FALLBACK = "torch"
# Implementations that need several graphs; lragent.compile.split_step splits steps between them.
GRAPHS: dict[str, tuple[str, ...]] = {"inductor": ("inductor_decode", "inductor_prefill")}


def graphs(attention: str) -> tuple[str, ...]:
    """Names of the lowered graphs that an implementation consists of."""
    return GRAPHS.get(attention, (attention,))


def require_attention(attention: str, device: str) -> None:
    """Raises RequestError unless an implementation, or "auto", exists for a device; nothing is loaded or built."""
    kind = device.split(":")[0]
    there = [name for name, kinds in IMPLEMENTATIONS.items() if kind in kinds]
    hint = f"Use auto, {', '.join(there[:-1])} or {there[-1]}."
    if attention != "auto" and attention not in IMPLEMENTATIONS:
        raise RequestError(f"attention {attention!r} is not available", hint)
    if attention != "auto" and attention not in there:
        raise RequestError(f"attention {attention!r} does not run on {device}", hint)


def resolve(attention: str, device: str) -> str:
    """Name of the implementation for a device, ready to run; "auto" chooses.

    The C++ kernels are loaded, and built once on a new machine, if they are what is chosen; so are the Triton kernels.

    Raises:
        RequestError: unknown, not available on this device, or "triton" was asked for and isn't installed.
        CompilerMissing: "cpp" was asked for and can't be built.
    """
    require_attention(attention, device)
    if attention == "auto":
        return _best(device.split(":")[0])
    if attention == "cpp":
        cpp_library.load()
    if attention == "triton":
        triton_library.load()
    return attention


def _best(kind: str) -> str:
    if kind == "cpu":
        return "cpp" if _has_cpp() else "torch"
    if not triton_library.is_installed():
        _LOG.warning("attention torch, which is slower: triton isn't installed")
        return "torch"
    triton_library.load()
    return "triton"


def _has_cpp() -> bool:
    try:
        cpp_library.load()
    except CompilerMissing as error:
        _LOG.warning("attention torch, which is slower: %s", error.message)
        return False
    return True
