"""The estimate against figures worked out by hand for a model of 8 billion weights with three agents of rank 8."""

from __future__ import annotations

import pytest

from lragent.errors import RequestError
from lragent.program.cache_schema import BaseStreams, CacheSchema, LowRankStream
from lragent.reports.roofline import GPUS, Load, ModelShape, estimate, gpu_named, shape_of_model
from tests.models import WrittenModel

LAYERS, AGENTS, RANK = 32, 3, 8
BASE = LAYERS * 2 * 8 * 128 * 2  # bytes a token
COLUMNS = LAYERS * 2 * RANK * 2
WEIGHTS = 8_000_000_000
SHAPE = ModelShape(
    WEIGHTS,
    CacheSchema(
        "split",
        tuple("abc"),
        tuple(BaseStreams(layer, 8, 128, 128) for layer in range(LAYERS)),
        tuple(LowRankStream(f"{n}", (RANK,) * AGENTS, (0, 1, 2)) for n in range(2 * LAYERS)),
    ),
)
LOAD = Load(trajectories=32, decoding=3, context=16384)
TOKENS = 32 * 16384
H100 = GPUS["h100"]


def test_each_scheme_reads_what_its_layout_holds() -> None:
    reads = {name: estimate(SHAPE, H100, LOAD, name) for name in ("non_shared", "full_shared", "base_lr_shared")}
    assert (BASE, COLUMNS) == (131_072, 1_024)
    assert reads["non_shared"].read == reads["non_shared"].read_once == reads["full_shared"].read == 3 * TOKENS * BASE
    assert reads["full_shared"].read_once == TOKENS * BASE
    assert reads["base_lr_shared"].read == 3 * TOKENS * (BASE + COLUMNS)
    assert reads["base_lr_shared"].read_once == TOKENS * (BASE + 3 * COLUMNS)


def test_held_bytes_follow_from_who_owns_columns() -> None:
    held = {name: estimate(SHAPE, H100, LOAD, name).held for name in ("non_shared", "full_shared", "rebase_shared")}
    assert held == {
        "non_shared": 3 * TOKENS * BASE,
        "full_shared": TOKENS * BASE,
        "rebase_shared": TOKENS * (BASE + 3 * COLUMNS),
    }
    assert not estimate(SHAPE, H100, LOAD, "non_shared").fits
    assert estimate(SHAPE, H100, Load(1, 1, 1024), "non_shared").fits


def test_time_is_that_of_the_bytes_or_of_the_products() -> None:
    step = estimate(SHAPE, H100, LOAD, "base_lr_shared")
    assert step.seconds == pytest.approx((2 * WEIGHTS + step.read) / 3.35e12)
    many = estimate(SHAPE, H100, Load(trajectories=4096, decoding=1, context=1), "full_shared")
    assert many.seconds == pytest.approx(2 * WEIGHTS * 4096 / 989e12)


def test_unknown_gpus_are_refused() -> None:
    with pytest.raises(RequestError, match="no data sheet of GPU 'abacus'"):
        gpu_named("abacus")


def test_shape_of_a_model_directory(tiny_llama: WrittenModel) -> None:
    shape = shape_of_model(tiny_llama.model_dir, agents=2, rank=4)
    assert shape.schema.agents == ("agent0", "agent1")
    assert all(stream.ranks == (4, 4) for stream in shape.schema.low_rank)
    assert shape.weights > 0 and len(shape.schema.low_rank) == 2 * len(shape.schema.base)


def test_an_adapter_free_row_is_read_and_multiplied_beside_the_agents_own() -> None:
    neutral, other = (estimate(SHAPE, H100, LOAD, name) for name in ("neutral_shared", "base_lr_shared"))
    assert (neutral.held, neutral.read_once) == (other.held, other.read_once)
    assert neutral.read == other.read + 3 * TOKENS * BASE
    many = estimate(SHAPE, H100, Load(trajectories=4096, decoding=1, context=1), "neutral_shared")
    assert many.seconds == pytest.approx(2 * 2 * WEIGHTS * 4096 / 989e12)
