"""Least time of a decode step on a GPU, by sharing scheme: what must pass through memory, at the memory's rated speed.

An estimate from data sheets, not a measurement. Weights and cache pass once, in 16 bits a number, and the products with
the weights run at the rated speed beside it; attention's own arithmetic, launches and everything else are left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.artifact.directory import open_artifact
from lragent.errors import RequestError
from lragent.program.cache_schema import BaseStreams, CacheSchema, LowRankStream
from lragent.program.dtypes import dtype_named
from lragent.runtime.schemes import SCHEMES, Scheme

BYTES_A_NUMBER = 2


@dataclass(frozen=True)
class Gpu:
    """Data sheet: bytes of memory, its bytes a second, and dense 16-bit operations a second."""

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
    """Numbers in the weights, and the cache of a split layout."""

    weights: int
    schema: CacheSchema


@dataclass(frozen=True)
class Load:
    """Trajectories of equal length, of each of which some agents decode in the same step."""

    trajectories: int
    decoding: int
    context: int


@dataclass(frozen=True)
class StepEstimate:
    """One scheme's decode step.

    Args:
        held: bytes of cache once every agent has seen every token.
        fits: weights and `held` fit into the GPU's memory.
        read: bytes of cache that the step reads if every request reads its own; seconds: the step's time then.
        read_once: the same if agents of a trajectory share one reading of what they share; seconds_once: its time.
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
    """Raises RequestError for an unknown name, listing the known ones."""
    if name.lower() not in GPUS:
        raise RequestError(f"no data sheet of GPU {name!r}", f"Choose one of: {', '.join(GPUS)}.")
    return GPUS[name.lower()]


def shape_of_artifact(path: Path) -> ModelShape:
    """Reads the manifest only."""
    manifest = open_artifact(path).manifest
    entry = manifest.layouts.get("split") or manifest.layouts["dense"]
    size = dtype_named(manifest.dtype).itemsize
    return ModelShape(sum(file.size for file in manifest.weights) // size, entry.schema)


def shape_of_model(model_dir: Path, agents: int, rank: int) -> ModelShape:
    """From a model's configuration, without its weights; agents have adapters of their own A on every K and V.

    Raises:
        RequestError: the configuration does not say what its attention looks like.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(model_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        heads = config.num_attention_heads
        layers, kv_heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except AttributeError as error:
        raise RequestError(f"the configuration in {model_dir} has no {error.name}", "Give an artifact.") from error
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
    """The decode step of one scheme."""
    scheme = SCHEMES[sharing]
    agents = range(min(load.decoding, max(len(shape.schema.agents), 1)))
    base = shape.schema.base_numbers_per_token()
    columns = [sum(s.ranks[a] for s in shape.schema.low_rank) if _splits(shape, scheme) else 0 for a in agents]
    tokens = load.trajectories * load.context * BYTES_A_NUMBER
    read = tokens * (base * len(agents) + sum(columns))
    read_once = read if scheme.page_table_per_agent else tokens * (base + sum(columns))
    held = tokens * _held(shape, scheme)
    weights = shape.weights * BYTES_A_NUMBER
    products = 2 * shape.weights * load.trajectories * len(agents) / gpu.operations
    seconds, seconds_once = (max((weights + cache) / gpu.bandwidth, products) for cache in (read, read_once))
    return StepEstimate(sharing, held, weights + held <= gpu.memory, read, seconds, read_once, seconds_once)


def _splits(shape: ModelShape, scheme: Scheme) -> bool:
    return scheme.layout == "split" and bool(shape.schema.agents)


def _held(shape: ModelShape, scheme: Scheme) -> int:
    """Numbers a token takes once all agents have seen it."""
    base, agents = shape.schema.base_numbers_per_token(), range(len(shape.schema.agents))
    if scheme.page_table_per_agent:
        return base * max(len(agents), 1)
    if not _splits(shape, scheme):
        return base
    return base + sum(shape.schema.lr_numbers_per_token(agent, scheme.lr_blocks) for agent in agents)
