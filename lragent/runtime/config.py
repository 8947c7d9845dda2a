"""Options of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lragent.errors import RequestError
from lragent.program.defaults import DEVICE, KV_MEMORY, MAX_BATCH_TOKENS
from lragent.program.step import PAGE_SIZE
from lragent.runtime.schemes import Scheme, scheme_named
from lragent.runtime.threads import require_threads


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine, checked when they are made.

    Args:
        sharing: name of the sharing scheme (runtime/schemes.py); "auto" is decided before (artifact/sharing_choice.py).
        kv_memory: bytes of cache, or text such as "2GiB"; rounded down to whole pages.
        max_batch_tokens: most tokens per step.
        page_size: tokens per page.
        kv_dtype: dtype of all cache tensors.
        device: device of the cache and the program.
        stop_token_ids: the model's own stop tokens.
        agents: agents that will act besides `base`; the cache stores no LR values of others. None: all agents.
        spare: spare agent slots with LR blocks of their own in the cache, for new versions of adapters whose A changes
            while trajectories of the version before are open (`Engine.update_adapters`).
        threads: torch's number of CPU threads, which is one setting per process; None keeps it.

    Raises:
        RequestError: unknown scheme, a size below 1, a negative number of spare slots, or a number of threads that
            torch can't be set to.
    """

    sharing: str
    kv_memory: int | str = KV_MEMORY
    max_batch_tokens: int = MAX_BATCH_TOKENS
    page_size: int = PAGE_SIZE
    kv_dtype: torch.dtype = torch.float32
    device: str | torch.device = DEVICE
    stop_token_ids: Sequence[int] = ()
    agents: Sequence[str] | None = None
    threads: int | None = None
    spare: int = 0

    def __post_init__(self) -> None:
        scheme_named(self.sharing)
        require_threads(self.threads)
        for name, value in (("max_batch_tokens", self.max_batch_tokens), ("page_size", self.page_size)):
            if value < 1:
                raise RequestError(f"{name} is {value}, must be at least 1")
        if self.spare < 0:
            raise RequestError(f"spare is {self.spare}, must not be negative")

    @property
    def scheme(self) -> Scheme:
        return scheme_named(self.sharing)
