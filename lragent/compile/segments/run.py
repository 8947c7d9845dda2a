"""Runs a graph that was compiled in segments: one package after another, as its plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lragent.compile.aoti_package import Run, open_package
from lragent.compile.export import CPU
from lragent.compile.segments.plan import INPUT, VALUE, WEIGHT, Call, Plan, read_plan
from lragent.errors import ArtifactError, InternalError


@dataclass(frozen=True)
class _Step:
    """A bound call: `given` holds its weights, and at the places of `holes` it takes the values in those slots."""

    run: Run
    given: list[Tensor | None]
    holes: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]
    last_used: tuple[int, ...]  # slots that nobody reads afterwards


class SegmentsCall:
    """A callable over all graph inputs; it keeps the weights alive that it reads."""

    def __init__(self, steps: Sequence[_Step], slots: int, result: int) -> None:
        self._steps, self._slots, self._result = steps, slots, result
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        values: list[Tensor | None] = [*inputs, *[None] * (self._slots - len(inputs))]
        with torch.no_grad():
            for step in self._steps:
                given = step.given.copy()
                for place, slot in step.holes:
                    given[place] = values[slot]
                for slot in step.last_used:
                    values[slot] = None
                for slot, value in zip(step.outputs, step.run(given), strict=True):
                    values[slot] = value
        logits = values[self._result]
        assert logits is not None
        return logits


def load_segments(path: Path, weights: Mapping[str, Tensor], input_names: Sequence[str]) -> SegmentsCall:
    """Loads the packages that a plan names.

    Args:
        path: of the plan.
        input_names: of the whole graph's inputs, in order.

    Raises:
        ArtifactError: the plan is damaged.
    """
    plan = read_plan(path)
    runs = [open_package(path.parent / entry.path, {}, CPU) for entry in plan.packages]
    try:
        return bind(plan, runs, weights, input_names)
    except (KeyError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged: it names {error}, which is not there", "Convert again.") from error


def bind(plan: Plan, runs: Sequence[Run], weights: Mapping[str, Tensor], input_names: Sequence[str]) -> SegmentsCall:
    """One callable out of what runs each package of a plan.

    Raises:
        KeyError, IndexError: a name or number in the plan that means nothing.
    """
    slots = {INPUT + name: slot for slot, name in enumerate(input_names)}
    for call in plan.calls:
        slots |= {name: len(slots) + place for place, name in enumerate(call.outputs)}
    last = {source: number for number, call in enumerate(plan.calls) for source in call.inputs if source != plan.result}
    steps = [_step(call, number, runs, weights, slots, last) for number, call in enumerate(plan.calls)]
    return SegmentsCall(steps, len(slots), slots[plan.result])


def _step(
    call: Call,
    number: int,
    runs: Sequence[Run],
    weights: Mapping[str, Tensor],
    slots: Mapping[str, int],
    last: Mapping[str, int],
) -> _Step:
    given: list[Tensor | None] = []
    holes: list[tuple[int, int]] = []
    for place, source in enumerate(call.inputs):
        name = source.removeprefix(WEIGHT)
        if name == source:
            given.append(None)
            holes.append((place, slots[source]))
            continue
        if name not in weights:
            raise InternalError(f"a segment wants weight {name}, which the artifact does not hold")
        given.append(weights[name].detach().contiguous())
    ended = (slots[source] for source, at in last.items() if at == number and source.startswith(VALUE))
    return _Step(runs[call.package], given, tuple(holes), tuple(slots[name] for name in call.outputs), tuple(ended))
