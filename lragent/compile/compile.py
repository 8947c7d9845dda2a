"""Turns a lowered graph into a `Program` for the runtime.

`backend="compiled"` uses AOTInductor: one package (unit "model") or one per kind of layer (unit "layer") serves
prefill, decode and mixed steps. Packages contain no weights; they read them in place from memory-mapped files.
`backend="eager"` runs the same lowered graph op by op.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from lragent.compat.torch import find_cpp_compiler
from lragent.compile.aoti_package import Run, open_package, write_package
from lragent.compile.export import CPU, export_graph
from lragent.compile.gpu.cuda_graphs import DeviceSteps
from lragent.compile.segments.compile_segments import compile_segments
from lragent.compile.segments.plan import is_plan
from lragent.compile.segments.run import load_segments
from lragent.compile.segments.shapes import CannotCut
from lragent.compile.split_step import homogeneous_call
from lragent.errors import CompilerMissing, Miss, RequestError
from lragent.kernels.implementations import FALLBACK, GRAPHS, IMPLEMENTATIONS
from lragent.program.agent import Agent
from lragent.program.cache_schema import CacheSchema
from lragent.program.dtypes import dtype_name
from lragent.program.program import Program, run_flat
from lragent.program.step import STEP_INPUTS, cache_input_names

log = logging.getLogger(__name__)

UNITS = ("model", "layer")
PACKAGE = "program.pt2"
# Version of the custom ops' signatures and semantics. A package compiled for another version is not loaded.
OP_ABI = 2


@dataclass(frozen=True)
class ProgramFacts:
    """The fields of a `Program` other than its callable.

    Args:
        dtype: dtype of the weights.
        attention: the chosen attention implementation.
        fallback: one miss per layer that runs `implementations.FALLBACK` instead.
    """

    schema: CacheSchema
    agents: tuple[Agent, ...]
    max_positions: int
    vocab_size: int
    dtype: torch.dtype
    attention: str
    fallback: tuple[Miss, ...]

    @property
    def attention_text(self) -> str:
        """The chosen implementation and, if there are any, the number of layers that run another one."""
        if not self.fallback:
            return self.attention
        return f"{self.attention}, {FALLBACK} on {len(self.fallback)} of {len(self.schema.base)} layers"

    @property
    def cuda_graph_safe(self) -> bool:
        """True if the attention of every layer can run in a CUDA graph."""
        used = (self.attention, FALLBACK) if self.fallback else (self.attention,)
        return all(IMPLEMENTATIONS[name].cuda_graph_safe for name in used)


def target_name(device: torch.device = CPU) -> str:
    """Names the target of a compiled package: kind of device, instruction set, torch version, `OP_ABI`."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
    elif torch.version.hip is not None:
        capability = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    else:
        capability = "sm{}{}".format(*torch.cuda.get_device_capability(device))
    version = torch.__version__.split("+")[0]
    return f"{device.type}-{capability.lower().replace(' ', '')}-torch{version}-abi{OP_ABI}"


def require_compiler() -> None:
    """Raises CompilerMissing if Inductor finds no C++ compiler, or can't run it."""
    compiler = find_cpp_compiler()
    if compiler is None:
        raise CompilerMissing("no C++ compiler was found", _COMPILER_HINT)
    if shutil.which(compiler) is None:
        raise CompilerMissing(f"the C++ compiler {compiler!r} can't be run", _COMPILER_HINT)


_COMPILER_HINT = 'Install g++ (or set CXX), or use backend="eager", which needs none but is slower.'


@dataclass(frozen=True)
class Compiled:
    """The result of `compile_graph`.

    Args:
        file: a package, or the plan of several packages.
        refusal: reason why unit "layer" was not used; "" if it was, or was not requested.
    """

    file: Path
    refusal: str = ""


def require_unit(unit: str) -> None:
    """Raises RequestError for a unit that does not exist."""
    if unit not in UNITS:
        raise RequestError(f"unknown unit {unit!r}", f"Use {' or '.join(UNITS)}.")


def compile_graph(
    graph: fx.GraphModule,
    schema: CacheSchema,
    kv_dtype: torch.dtype,
    graph_name: str,
    unit: str,
    directory: Path,
    device: torch.device = CPU,
) -> Compiled:
    """Compiles a lowered graph into `directory`. The files contain no weights.

    Args:
        graph: the lowered graph, with its weights on `device`.
        kv_dtype: dtype of the cache tensors.
        graph_name: name of the graph among those of its attention implementation (`lragent.kernels.dispatch.graphs`).
        unit: "model": one package; "layer": one package per kind of segment (`compile/segments`). A graph on a GPU, and
            one that can't be cut, is compiled as with "model".

    Raises:
        CompilerMissing: there is no C++ compiler.
        NoSpace: the directory of temporary files is full.
    """
    require_compiler()
    steps = GRAPHS[graph_name].steps
    refusal = ""
    if unit == "layer" and device.type == "cpu":
        try:
            return Compiled(compile_segments(graph, schema, kv_dtype, steps, directory))
        except CannotCut as error:
            refusal = str(error)
            log.warning("the model is compiled in one package, not by layer: %s", refusal)
    package = directory / PACKAGE
    write_package(export_graph(graph, schema, kv_dtype, steps, device), package)
    return Compiled(package, refusal)


def load_compiled(
    file: Path, schema: CacheSchema, weights: Mapping[str, Tensor], device: torch.device
) -> Callable[..., Tensor]:
    """Loads the result of `compile_graph`.

    Args:
        file: `Compiled.file`.
        weights: weights by name, on `device`; they are read in place, nothing is copied.

    Returns:
        A callable over all graph inputs that returns logits `[R, vocab]`. It keeps the weights alive.

    Raises:
        ArtifactError: the file is a damaged plan.
        InternalError: the program reads a weight that `weights` lacks.
    """
    if is_plan(file):
        return load_segments(file, weights, (*STEP_INPUTS, *cache_input_names(schema)))
    return _PackageCall(open_package(file, weights, device), weights)


class _PackageCall:
    """A loaded package and the weights that it reads."""

    def __init__(self, run: Run, weights: Mapping[str, Tensor]) -> None:
        self._run = run
        self._weights = weights
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            (logits,) = self._run([*inputs])
        return logits


def eager_call(graph: fx.GraphModule) -> Callable[..., Tensor]:
    """Returns a callable over all graph inputs that runs a lowered graph op by op, without gradients."""

    def call(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = graph(*inputs)
        return logits

    return call


def join(calls: Mapping[str, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """Combines the graphs of one attention implementation into a callable that serves any step.

    Args:
        calls: graph name (`lragent.kernels.dispatch.graphs`) -> callable over all graph inputs: one graph for any step,
            or one for decodes and one for prefill.

    Returns:
        A callable over all graph inputs (`STEP_INPUTS`, then the cache) that returns logits `[R, vocab]`.
    """
    by_steps = {GRAPHS[name].steps: call for name, call in calls.items()}
    return by_steps["any"] if "any" in by_steps else homogeneous_call(by_steps["decode"], by_steps["prefill"])


def program(call: Callable[..., Tensor], facts: ProgramFacts, backend: str, device: torch.device) -> Program:
    """Wraps a callable as the runtime's `Program`. Logs one warning if some layers run the fallback attention.

    Args:
        call: takes all graph inputs on `device` and returns logits `[R, vocab]`.
        backend: "compiled" or "eager", for reports.
    """
    if facts.fallback:
        log.warning("attention %s: %s", facts.attention_text, facts.fallback[0].reason)
    return Program(
        schema=facts.schema,
        agents=facts.agents,
        max_positions=facts.max_positions,
        vocab_size=facts.vocab_size,
        run=run_flat(call) if device.type == "cpu" else DeviceSteps(call, device, facts.cuda_graph_safe).run,
        facts={
            "backend": backend,
            "attention": facts.attention_text,
            "device": str(device),
            "dtype": dtype_name(facts.dtype),
        },
    )
