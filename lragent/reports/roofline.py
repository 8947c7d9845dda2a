"""Least time of a decode step on a GPU, by sharing scheme: memory traffic at the memory's rated speed.

This is an estimate from data sheets, not a measurement. Weights and cache are read once, in 16 bits a number. The
products with the weights run at the rated speed at the same time. Attention's own arithmetic, kernel launches and
everything else are left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.artifact.directory import open_artifact
from lragent.errors import RequestError
from lragent.loading.checkpoint import Checkpoint, loading_errors, read_config
from lragent.program.cache_schema import BaseStreams, CacheSchema, LowRankStream
from lragent.program.dtypes import dtype_named
from lragent.runtime.cache_cost import bytes_per_token
from lragent.runtime.schemes import SCHEMES

CACHE_DTYPE = "bfloat16"
BYTES_A_NUMBER = dtype_named(CACHE_DTYPE).itemsize


@dataclass(frozen=True)
class Gpu:
    """Data sheet: bytes of memory, bytes a second of its bandwidth, and dense 16-bit operations a second."""

    memory: float
    bandwidth: float
    operations: float


GPUS = {
    "a100": Gpu(80e9, 2.04e12, 312e12),
    "h100": Gpu(80e9, 3.35e12, 989e12),
    "h200": Gpu(141e9, 4.8e12, 989e12),
    "b200": Gpu(180e9, 7.7e12, 2250e12),
    "l40s": Gpu(48e9, 0.864e12, 362e12),
    "mi300x": Gpu(192e9, 5.3e12, 1307e12),
}


@dataclass(frozen=True)
class ModelShape:
    """The number of weights, and the cache schema: split, or dense where split layout was refused."""

    weights: int
    schema: CacheSchema


@dataclass(frozen=True)
class Load:
    """Trajectories of `context` tokens each; `decoding` agents of each trajectory decode in the same step."""

    trajectories: int
    decoding: int
    context: int


@dataclass(frozen=True)
class StepEstimate:
    """One scheme's decode step.

    Args:
        held: bytes of cache after every agent has seen every token.
        fits: True if weights and `held` fit into the GPU's memory.
        read: bytes of cache that the step reads if every row reads separately; seconds: its time then.
        read_once: bytes if the rows of a trajectory read shared pages once; seconds_once: its time then.
    """

    sharing: str
    held: float
    fits: bool
    read: float
    seconds: float
    read_once: float
    seconds_once: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def gpu_named(name: str) -> Gpu:
    """The data sheet of a GPU. Raises RequestError for an unknown name; the message lists the known ones."""
    if name.lower() not in GPUS:
        raise RequestError(f"no data sheet of GPU {name!r}", f"Choose one of: {', '.join(GPUS)}.")
    return GPUS[name.lower()]


def shape_of_artifact(path: Path) -> ModelShape:
    """The shape of an artifact, from its manifest."""
    manifest = open_artifact(path).manifest
    entry = manifest.layouts.get("split") or manifest.layouts["dense"]
    size = dtype_named(manifest.dtype).itemsize
    return ModelShape(sum(file.size for file in manifest.weights) // size, entry.schema)


def shape_of_model(model_dir: Path, agents: int, rank: int) -> ModelShape:
    """The shape of a model with agents that have different adapters of one rank on every K and V.

    Only the model's configuration is read.

    Raises:
        ModelError: the configuration can't be read, or needs code from the model's folder.
        RequestError: the configuration lacks the sizes of attention.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(Checkpoint(model_dir))
    with loading_errors(model_dir), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=None, trust_remote_code=False)
    try:
        heads = config.num_attention_heads
        layers, kv_heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except AttributeError as error:
        raise RequestError(
            f"the configuration in {model_dir} has no {error.name}", "Convert it, and name the artifact."
        ) from error
    own = tuple(range(agents))
    return ModelShape(
        weights=sum(parameter.numel() for parameter in model.parameters()),
        schema=CacheSchema(
            layout="split",
            agents=tuple(f"agent{a}" for a in own),
            base=tuple(BaseStreams(layer, kv_heads, dim, dim) for layer in range(layers)),
            low_rank=tuple(
                LowRankStream(f"{layer}.{side}", (rank,) * agents, own) for layer in range(layers) for side in "kv"
            ),
        ),
    )


def estimate(shape: ModelShape, gpu: Gpu, load: Load, sharing: str) -> StepEstimate:
    """Estimates the decode step of one scheme. Products run beside memory traffic; the longer of the two counts."""
    scheme = SCHEMES[sharing]
    held_per_token = bytes_per_token(_by_layout(shape.schema), shape.schema.agents, CACHE_DTYPE)[sharing][-1]
    agents = range(min(load.decoding, max(len(shape.schema.agents), 1)))
    base = BYTES_A_NUMBER * shape.schema.base_numbers_per_token()
    columns = 0
    if scheme.layout == "split" and shape.schema.agents:
        columns = BYTES_A_NUMBER * sum(stream.ranks[agent] for stream in shape.schema.low_rank for agent in agents)
    tokens = load.trajectories * load.context
    held = tokens * held_per_token
    # Under `neutral_shared` an adapter-free row writes the token, and the agent's row reads.
    rows = 2 if scheme.written_as_base else 1
    read = tokens * (base * len(agents) * rows + columns)
    read_once = read if scheme.page_table_per_agent else tokens * (base + columns)
    weights = shape.weights * BYTES_A_NUMBER
    products = 2 * shape.weights * load.trajectories * len(agents) * rows / gpu.operations
    seconds, seconds_once = (max((weights + cache) / gpu.bandwidth, products) for cache in (read, read_once))
    return StepEstimate(sharing, held, weights + held <= gpu.memory, read, seconds, read_once, seconds_once)


def _by_layout(schema: CacheSchema) -> dict[str, CacheSchema]:
    """The schema for schemes with LR streams, and the same without LR streams for the others."""
    return {"split": schema, "dense": dataclasses.replace(schema, layout="dense", low_rank=())}
