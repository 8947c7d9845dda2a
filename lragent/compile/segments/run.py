"""Runs a graph compiled in segments: calls the packages one after another, in the order of the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lragent.compile.aoti_package import Run, open_package
from lragent.compile.export import CPU
from lragent.compile.segments.plan import INPUT, VALUE, WEIGHT, Call, SegmentPlan, read_plan
from lragent.errors import ArtifactError, InternalError


@dataclass(frozen=True)
class BoundCall:
    """A segment's call with its weights bound. Registers hold the graph inputs and the values passed between calls.

    Args:
        run: the loaded package.
        arguments: the weights at their argument indices; None for arguments that are read from registers.
        reads: (argument index, register) of every argument that is read from a register.
        writes: register of each output.
        released: registers that no later call reads.
    """

    run: Run
    arguments: list[Tensor | None]
    reads: tuple[tuple[int, int], ...]
    writes: tuple[int, ...]
    released: tuple[int, ...]


class SegmentsCall:
    """A callable over all graph inputs; it keeps the weights that it reads alive.

    Args:
        bound: the calls in execution order.
        registers: number of registers; the first ones hold the graph inputs.
        result: register of the logits.
    """

    def __init__(self, bound: Sequence[BoundCall], registers: int, result: int) -> None:
        self._bound, self._registers, self._result = bound, registers, result
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        registers: list[Tensor | None] = [*inputs, *[None] * (self._registers - len(inputs))]
        with torch.no_grad():
            for call in self._bound:
                arguments = call.arguments.copy()
                for index, register in call.reads:
                    arguments[index] = registers[register]
                for register in call.released:
                    registers[register] = None
                for register, value in zip(call.writes, call.run(arguments), strict=True):
                    registers[register] = value
        logits = registers[self._result]
        assert logits is not None
        return logits


def load_segments(path: Path, weights: Mapping[str, Tensor], input_names: Sequence[str]) -> SegmentsCall:
    """Loads the packages of a plan onto the CPU and binds their weights.

    Args:
        path: the plan; its packages are in the same directory.
        weights: weights by name.
        input_names: names of the whole graph's inputs, in order.

    Raises:
        ArtifactError: the plan is damaged.
    """
    plan = read_plan(path)
    runs = [open_package(path.parent / entry.path, {}, CPU) for entry in plan.packages]
    try:
        return bind(plan, runs, weights, input_names)
    except (KeyError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged: it names {error}, which doesn't exist", "Convert again.") from error


def bind(
    plan: SegmentPlan, runs: Sequence[Run], weights: Mapping[str, Tensor], input_names: Sequence[str]
) -> SegmentsCall:
    """Assigns registers to all values of a plan and binds its calls.

    Args:
        runs: the callable of each package, in the order of `plan.packages`.
        weights: weights by name.
        input_names: names of the whole graph's inputs, in order.

    Raises:
        KeyError, IndexError: the plan uses an unknown name or number.
        InternalError: a segment reads an unknown weight.
    """
    registers = {INPUT + name: register for register, name in enumerate(input_names)}
    for call in plan.calls:
        registers |= {name: len(registers) + offset for offset, name in enumerate(call.outputs)}
    last_read = {
        source: number for number, call in enumerate(plan.calls) for source in call.inputs if source != plan.result
    }
    bound = [_bind_call(call, number, runs, weights, registers, last_read) for number, call in enumerate(plan.calls)]
    return SegmentsCall(bound, len(registers), registers[plan.result])


def _bind_call(
    call: Call,
    number: int,
    runs: Sequence[Run],
    weights: Mapping[str, Tensor],
    registers: Mapping[str, int],
    last_read: Mapping[str, int],
) -> BoundCall:
    arguments: list[Tensor | None] = []
    reads: list[tuple[int, int]] = []
    for index, source in enumerate(call.inputs):
        name = source.removeprefix(WEIGHT)
        if name == source:
            arguments.append(None)
            reads.append((index, registers[source]))
            continue
        if name not in weights:
            raise InternalError(f"a segment reads weight {name}, which the artifact does not contain")
        arguments.append(weights[name].detach().contiguous())
    released = (registers[source] for source, at in last_read.items() if at == number and source.startswith(VALUE))
    writes = tuple(registers[name] for name in call.outputs)
    return BoundCall(runs[call.package], arguments, tuple(reads), writes, tuple(released))
