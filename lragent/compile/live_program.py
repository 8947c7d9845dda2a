"""The runnable program of a model in memory."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lragent.compile.compile import ProgramFacts, compile_graph, eager_call, join, load_compiled, program
from lragent.compile.export import CPU, tensors_of
from lragent.compile.fingerprint import fingerprint
from lragent.compile.live_adapters.a_digest import with_a_digests
from lragent.compile.live_adapters.slots import ConstantSlots
from lragent.errors import Miss
from lragent.kernels.dispatch import graphs
from lragent.program.agent import Agent
from lragent.program.program import Program

if TYPE_CHECKING:
    from lragent.loading.model import LoadedModel
    from lragent.passes.pipeline import Transformed

log = logging.getLogger(__name__)


def program_of_model(
    loaded: LoadedModel,
    transformed: Transformed,
    backend: str,
    attention: str,
    kv_dtype: torch.dtype,
    unit: str = "model",
) -> Program:
    """Lowers and compiles the program of a model in memory, on the CPU. Misses of rewriting passes are logged.

    Args:
        loaded: the model and its agents.
        transformed: its rewritten graph in one layout.
        backend: "compiled" or "eager".
        attention: name of an attention implementation, already resolved.
        kv_dtype: dtype of the cache.
        unit: "model" or "layer", see `compile_graph`.

    Raises:
        CompilerMissing: the backend is "compiled" and there is no C++ compiler.
        NoSpace: the directory of temporary files is full.
    """
    from lragent.passes.pipeline import lower

    for miss in transformed.misses:
        log.warning("%s", miss)
    calls: dict[str, Callable[..., Tensor]] = {}
    fallback: dict[str, Miss] = {}  # by layer
    for name in graphs(attention):
        lowered = lower(transformed.graph, name)
        fallback.update({miss.where: miss for miss in lowered.fallback})
        if backend == "eager":
            calls[name] = eager_call(lowered.graph)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            built = compile_graph(lowered.graph, transformed.schema, kv_dtype, name, unit, Path(scratch))
            calls[name] = load_compiled(built.file, transformed.schema, tensors_of(transformed.graph), CPU)
    agents = with_a_digests(loaded.agents, loaded.lora, transformed.adapter_map)
    facts = ProgramFacts(
        schema=transformed.schema,
        agents=agents,
        max_positions=loaded.max_positions,
        vocab_size=loaded.vocab_size,
        dtype=loaded.dtype,
        attention=attention,
        fallback=tuple(fallback.values()),
    )
    constants = tensors_of(transformed.graph)
    return replace(
        program(join(calls), facts, backend, CPU),
        identity=partial(_identity, loaded.agents, transformed),
        adapters=ConstantSlots(agents, transformed.adapter_map, constants, loaded.dtype),
    )


def _identity(agents: tuple[Agent, ...], transformed: Transformed) -> dict[str, Any]:
    """See `Program.identity`; reads all weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors_of(transformed.graph).items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {
        "agents": {agent.name: agent.digest for agent in agents},
        "program": fingerprint(transformed.graph, transformed.schema),
        "weights": sha.hexdigest(),
    }
