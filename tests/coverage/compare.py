"""One type, from config to verdict: built, converted in memory, compared with PEFT and with the scheme's definition."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lragent.capture.capture import capture
from lragent.compile.export import tensors_of
from lragent.compile.live_program import program_of_model
from lragent.errors import SplitRefused, UserError
from lragent.graph.graph_file import read_graph, write_graph
from lragent.loading.model import load_live
from lragent.passes.pipeline import Transformed, transform
from lragent.program.cache_schema import Layout
from lragent.runtime.config import EngineConfig
from lragent.runtime.engine import Engine
from tests.coverage.feeds import kv_channels, take_apart
from tests.coverage.tiny_model import AGENTS, PADDING, adapted_model, is_causal, logits, plain_model
from tests.e2e.scripts import forced, largest_difference, run_on_engine
from tests.oracle.sharing_oracle import SharingOracle, Step

PROMPT = [5, 40, 77, 12, 90, 33, 8, 61, 102, 55, 7, 19]
SCRIPT: tuple[Step, ...] = (
    ("append", PROMPT),
    ("turn", "plan", 4, None),
    ("append", [17, 23, 91]),
    ("turn", "action", 4, None),
    ("turn", "plan", 3, None),
    ("turn", "base", 2, None),
    ("turn", "reflect", 3, None),
)
# The engine's log-probabilities are float32: four units in the last place of log(1/128).
LOGPROB_ROUNDING = 2e-6
SCHEMES: dict[str, Layout] = {"non_shared": "dense", "base_lr_shared": "split"}


@dataclass
class Row:
    """What became of one type.

    Args:
        verdict: "split", "dense" (split layout refused), "refused", "not causal", "not built", "wrong" or "crash".
        reason: of a refusal, or transformers' error.
        streams: widths of base K, base V and of LR columns of each kind of layer.
        errors: scheme -> largest difference in log-probabilities, and what PEFT's float32 allows.
    """

    kind: str
    verdict: str = "crash"
    reason: str = ""
    streams: str = ""
    transforms: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(kind: str) -> Row:
    """Builds, converts and compares one type."""
    started = time.perf_counter()
    row = Row(kind)
    _fill(row)
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def _fill(row: Row) -> None:
    try:
        model = plain_model(row.kind)
    except Exception as error:
        row.verdict, row.reason = "not built", _line(error)
        return
    try:
        logits(model, PROMPT)
    except Exception:
        try:
            load_live(model)
        except UserError as error:
            row.verdict, row.reason = "refused", error.message
            return
        raise
    if not is_causal(model):
        row.verdict, row.reason = "not causal", "a later token changes the logits of earlier ones"
        return
    try:
        adapted = adapted_model(row.kind)
        loaded = load_live(adapted)
        captured = capture(loaded)
        programs: dict[Layout, Transformed] = {"dense": transform(captured, "dense")}
    except UserError as error:
        row.verdict, row.reason = "refused", error.message
        return
    row.verdict = "split"
    try:
        programs["split"] = transform(captured, "split")
        row.streams, row.transforms = _streams(programs["split"]), _transforms(programs["split"])
    except SplitRefused as error:
        row.verdict, row.reason = "dense", error.message
        row.streams = _streams(programs["dense"])
    double = copy.deepcopy(adapted).double()
    for scheme, layout in SCHEMES.items():
        if layout in programs:
            engine = Engine(
                program_of_model(loaded, _stored(programs[layout]), "eager", "torch", torch.float32),
                EngineConfig(sharing=scheme, kv_memory="8MiB"),
            )
            row.errors[scheme] = errors_of(engine, scheme, adapted, double)
    if any(not found <= allowed for found, allowed in row.errors.values()):
        row.verdict = "wrong"


def _stored(program: Transformed) -> Transformed:
    """The program as an artifact gives it back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.json"
        write_graph(program.graph, file)
        return replace(program, graph=read_graph(file, tensors_of(program.graph)))


def errors_of(engine: Engine, scheme: str, single: Any, double: Any) -> tuple[float, float]:
    """Largest difference between the engine and the float64 definition, and four times the float32 definition's."""
    asked = SCRIPT
    turns = run_on_engine(engine, asked)
    if any(PADDING in turn.token_ids for turn in turns):
        # Some types hide a padding token inside text from later tokens, which no cache can follow: go on without one.
        asked = tuple(
            (*step[:3], [t or 1 for t in turn.token_ids]) if turn else step for step, turn in _with_turns(SCRIPT, turns)
        )
        turns = run_on_engine(engine, asked)
    script = forced(asked, turns)
    channels = kv_channels(double.get_base_model())
    exact = _definition(double, channels, scheme, torch.float64).play(script)[1]
    close = _definition(single, channels, scheme, torch.float32).play(script)[1]
    allowed = max(4 * largest_difference(close, exact), LOGPROB_ROUNDING)
    difference = largest_difference(turns, exact)
    for turn, result in zip(turns, exact, strict=True):
        for token, best, gap in zip(turn.token_ids, result.likeliest, result.gaps, strict=True):
            if token != best and gap > allowed and asked is SCRIPT:
                difference = max(difference, gap)
    return difference, allowed


def _with_turns(script: Sequence[Step], turns: Sequence[Any]) -> Iterator[tuple[Step, Any]]:
    """Steps with their turns; steps without one as they are."""
    left = iter(turns)
    for step in script:
        yield step, next(left) if step[0] == "turn" else None


def _definition(model: Any, channels: dict[str, Tensor], scheme: str, dtype: torch.dtype) -> SharingOracle:
    model = copy.deepcopy(model)
    return SharingOracle(model, take_apart(model, channels), tuple(AGENTS), scheme, dtype)


def _streams(program: Transformed) -> str:
    base = {f"K {b.kv_heads}x{b.k_dim}, V {b.kv_heads}x{b.v_dim}" for b in program.schema.base}
    ranks = {"+".join(map(str, s.ranks)) for s in program.schema.low_rank}
    return "; ".join(sorted(base)) + (
        f"; LR {', '.join(sorted(ranks))} x{len(program.schema.low_rank)}" if ranks else ""
    )


def _transforms(program: Transformed) -> str:
    return ", ".join(sorted({layer.key_transform for layer in program.layers}))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
