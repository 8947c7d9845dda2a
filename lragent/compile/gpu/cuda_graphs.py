"""Steps on a GPU: inputs go there in one copy, and steps that take longer to launch than to run become CUDA graphs.

A step launches about twenty kernels a layer. Small steps are padded to few sizes (`packed_step.py`), and from the
`RUNS_BEFORE_CAPTURE`-th step of a size on, one launch replays them all.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lragent.compile.export import CPU
from lragent.compile.gpu.packed_step import StepSizes, buffer_for, pack, padded, sizes_of, views
from lragent.program.step import CacheTensors, StepInputs

log = logging.getLogger(__name__)

# Steps of more tokens keep a GPU busy while they are launched.
MOST_TOKENS = 1024
# A graph's logits are held at its place in one buffer of that many rows.
MOST_ROWS = 256
# A size that comes once isn't worth a capture, which takes as long as a few steps without.
RUNS_BEFORE_CAPTURE = 2
MOST_GRAPHS = 128
# Numbers that the buffer of inputs has room for at first; when it grows, all graphs are captured anew.
LEAST_ROOM = 1 << 16


@dataclass
class _Seen:
    """How often steps of a size ran without a graph, and their graph."""

    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class DeviceSteps:
    """Runs steps, whose inputs lie on the CPU, through a callable over all graph inputs on a GPU.

    Args:
        capture: whether steps may become CUDA graphs: nothing in `call` may look at the device's values.
    """

    def __init__(self, call: Callable[..., Tensor], device: torch.device, capture: bool) -> None:
        self._call = call
        self._device = device
        self._capture = capture
        self._host = self._there = torch.empty(0, dtype=torch.int64)
        self._copied: torch.cuda.Event | None = None
        self._logits: Tensor | None = None  # [MOST_ROWS, V], where graphs leave theirs
        self._cache: CacheTensors | None = None
        self._seen: OrderedDict[StepSizes, _Seen] = OrderedDict()
        self._pool: Any = None

    def run(self, step: StepInputs, cache: CacheTensors) -> Tensor:
        """Logits `[R, V]` on the device; see `lragent.program.program.Program`."""
        sizes = sizes_of(step)
        larger = padded(sizes)
        with torch.cuda.device(self._device):
            if not self._capture or larger.tokens > MOST_TOKENS or larger.rows > MOST_ROWS:
                logits: Tensor = self._call(*self._copy(step, sizes), *cache.tensors())
                return logits
            if cache is not self._cache:
                self._forget(cache)
            return self._run_padded(step, larger, cache)[: sizes.rows]

    def _run_padded(self, step: StepInputs, sizes: StepSizes, cache: CacheTensors) -> Tensor:
        inputs = self._copy(step, sizes)
        seen = self._seen.setdefault(sizes, _Seen())
        self._seen.move_to_end(sizes)
        if seen.graph is None and seen.runs >= RUNS_BEFORE_CAPTURE and self._capture:
            self._capture_graph(seen, inputs, cache)
        if seen.graph is not None and self._logits is not None:
            seen.graph.replay()
            return self._logits[: sizes.rows].clone()
        seen.runs += 1
        logits: Tensor = self._call(*inputs, *cache.tensors())
        if self._logits is None:
            self._logits = logits.new_empty(MOST_ROWS, logits.shape[1])
        return logits

    def _capture_graph(self, seen: _Seen, inputs: tuple[Tensor, ...], cache: CacheTensors) -> None:
        """Captures a step of these inputs' sizes; a program that can't be captured is never tried again."""
        assert self._logits is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._call(*inputs, *cache.tensors())
                self._logits[: logits.shape[0]].copy_(logits)
        except RuntimeError as error:
            log.warning("every kernel of a step is launched by itself, which is slower: no CUDA graph (%s)", error)
            self._capture = False
            return
        seen.graph = graph
        self._pool = graph.pool()
        held = [sizes for sizes, other in self._seen.items() if other.graph is not None]
        for sizes in held[: len(held) - MOST_GRAPHS]:
            del self._seen[sizes]

    def _forget(self, cache: CacheTensors | None) -> None:
        """Drops graphs: they read the cache, and the buffer of inputs, that they were captured with."""
        self._seen.clear()
        self._pool = None
        self._cache = cache

    def _copy(self, step: StepInputs, sizes: StepSizes) -> tuple[Tensor, ...]:
        """The step's inputs on the device, padded to `sizes`; they are overwritten by the next step's."""
        numbers = sizes.numbers()
        if self._there.numel() < numbers:
            self._forget(self._cache)
            room = max(LEAST_ROOM, 2 * numbers)
            self._host, self._there = (buffer_for(room, device) for device in (CPU, self._device))
        if self._copied is not None:
            self._copied.synchronize()
        pack(step, self._host, sizes)
        self._there[:numbers].copy_(self._host[:numbers], non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return views(self._there, sizes)
