"""Runs steps on a GPU: copies the inputs in one transfer, and replays small steps as CUDA graphs.

A step launches about twenty kernels per layer, and a small step takes longer to launch than to run. Small steps are
padded to few sizes (`packed_step.py`). After `RUNS_BEFORE_CAPTURE` steps of a size, a graph is captured; from then on
one launch replays all kernels.
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

# Larger steps run longer than their launches take, so that graphs gain nothing.
MOST_TOKENS = 1024
# Rows of the logits buffer that all graphs share.
MOST_ROWS = 256
# A capture takes as long as a few plain steps, so a size that occurs only once is not captured.
RUNS_BEFORE_CAPTURE = 2
MOST_GRAPHS = 128
# Initial capacity of the input buffer, in int64 numbers. When it grows, all graphs are captured again.
LEAST_ROOM = 1 << 16


@dataclass
class _Seen:
    """Number of steps of a size that ran without a graph, and the graph of that size."""

    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class DeviceSteps:
    """Runs steps whose inputs are on the CPU through a callable on a GPU.

    Args:
        call: takes all graph inputs on `device` and returns logits `[R, V]`.
        device: a CUDA device with an index.
        capture: True if steps may be captured as CUDA graphs. Then `call` must not read values back to the CPU.
    """

    def __init__(self, call: Callable[..., Tensor], device: torch.device, capture: bool) -> None:
        self._call = call
        self._device = device
        self._capture = capture
        self._host = self._on_device = torch.empty(0, dtype=torch.int64)
        self._copied: torch.cuda.Event | None = None
        self._logits: Tensor | None = None  # [MOST_ROWS, V], written by graphs
        self._cache: CacheTensors | None = None
        self._seen: OrderedDict[StepSizes, _Seen] = OrderedDict()
        self._pool: Any = None

    def run(self, step: StepInputs, cache: CacheTensors) -> Tensor:
        """Runs a step and returns logits `[R, V]` on the device; see `lragent.program.program.Program`.

        Args:
            step: inputs on the CPU.
            cache: cache tensors on the device.
        """
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
        """Captures a graph for the sizes of `inputs`. After a failed capture, no further one is tried."""
        assert self._logits is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = self._call(*inputs, *cache.tensors())
                self._logits[: logits.shape[0]].copy_(logits)
        except RuntimeError as error:
            log.warning("no CUDA graph: the kernels of a step are launched one by one, which is slower (%s)", error)
            self._capture = False
            return
        seen.graph = graph
        self._pool = graph.pool()
        captured = [sizes for sizes, other in self._seen.items() if other.graph is not None]
        for sizes in captured[: len(captured) - MOST_GRAPHS]:
            del self._seen[sizes]

    def _forget(self, cache: CacheTensors | None) -> None:
        """Drops all graphs. They are bound to the cache and the input buffer that they were captured with."""
        self._seen.clear()
        self._pool = None
        self._cache = cache

    def _copy(self, step: StepInputs, sizes: StepSizes) -> tuple[Tensor, ...]:
        """Copies the step's inputs to the device, padded to `sizes`. The next step overwrites them."""
        numbers = sizes.numbers()
        if self._on_device.numel() < numbers:
            self._forget(self._cache)
            room = max(LEAST_ROOM, 2 * numbers)
            self._host, self._on_device = (buffer_for(room, device) for device in (CPU, self._device))
        if self._copied is not None:
            self._copied.synchronize()
        pack(step, self._host, sizes)
        self._on_device[:numbers].copy_(self._host[:numbers], non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return views(self._on_device, sizes)
