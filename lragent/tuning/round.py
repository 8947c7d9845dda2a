"""One round: from trajectories to tuned weights in the model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lragent.errors import TuneError
from lragent.rollouts.run_facts import differences
from lragent.runtime.schemes import EXACT
from lragent.tuning.batches import Batch, batches_of_steps, for_step, learned_from, split_examples
from lragent.tuning.checkpoint import Progress, RoundState, read_checkpoint
from lragent.tuning.material import Material
from lragent.tuning.measure import Agreement, measure
from lragent.tuning.memory import Sizes, recomputes_layers, require_teacher_memory
from lragent.tuning.optimizer import adamw
from lragent.tuning.options import TuneOptions
from lragent.tuning.plan import Plan, batch_to_time, plan_round
from lragent.tuning.report import Figures, RoundReport, figures_from_json
from lragent.tuning.teacher import require_own_tokens, with_teacher
from lragent.tuning.train import Round, TuneStep, loss_of, train

MOST_MEASURED = 8  # trajectories, where none is held out


@dataclass(frozen=True)
class RoundInput:
    """Input of a round.

    Args:
        material: model with the parents' weights, and examples; without a teacher.
        parameters: those that are trained, by name.
        start: weights that the round begins with; empty: the parents'.
        facts: JSON; all that must be the same when the round is resumed.
    """

    material: Material
    parameters: Mapping[str, nn.Parameter]
    start: Mapping[str, Tensor]
    scheme: str
    options: TuneOptions
    sizes: Sizes
    checkpoint: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class RoundResult:
    """Result of a round; the tuned weights are in the model.

    Args:
        material: with the teacher.
        learned: indices of the examples that steps learned from; measured: of those that reports are about.
        held_out: True if no step learned from those.
        before: figures of the parents.
    """

    material: Material
    learned: tuple[int, ...]
    measured: tuple[int, ...]
    held_out: bool
    before: Figures
    report: RoundReport


def run_round(
    given: RoundInput,
    show: Callable[[str], None],
    on_step: Callable[[TuneStep], None] | None = None,
) -> RoundResult:
    """Runs a round, or the rest of one that has a checkpoint.

    Raises:
        TuneError: too little memory, another run's checkpoint, or a loss that is NaN.
        TaskFileError: the trajectories are not of this model.
    """
    started = time.monotonic()
    options, examples = given.options, given.material.examples
    saved = read_checkpoint(given.checkpoint)
    if saved is not None:
        require_same(given.checkpoint, saved.facts, given.facts)
    split = split_examples([example.tokens for example in examples], options)
    measured = split.held_out or split.train[:MOST_MEASURED]
    batches = list(islice(batches_of_steps(examples, split.train, options), options.steps))
    heaviest = EXACT if options.non_shared_share else given.scheme
    kept_states = {*measured, *_compared(batches)}
    given.material.model.checkpointing = recomputes_layers(given.material, batches, kept_states, heaviest, given.sizes)
    rate = options.peak_rate(given.sizes.hidden)
    optimizer = adamw(given.parameters.values(), rate)
    if saved is not None:
        # Other packs of examples would round their states otherwise: they are those of a run from the beginning.
        material = _with_teacher(given.material, {*measured, *_compared([batch_to_time(batches)])}, given, show)
        material = _with_teacher(material, _compared(batches[: saved.progress.steps]), given, show)
        before = figures_from_json(saved.facts["before"])
        facts, times = dict(saved.facts), saved.facts["times"]
        state = saved.put_into(given.parameters, optimizer)
    else:
        begin = _begin(given, measured, batches, show, started)
        material, before, plan = begin.material, begin.before, begin.plan
        for name, value in given.start.items():
            given.parameters[name].data.copy_(value)
        state = RoundState(dict(given.parameters), optimizer, Progress(plan.steps, plan.seconds_allowed))
        times = {"step": plan.seconds_a_step, "report": begin.seconds_of_report}
        facts = {**given.facts, "before": _to_json(before), "times": times}
    this = Round(
        material,
        given.scheme,
        options,
        batches,
        split.held_out,
        rate,
        given.checkpoint,
        facts,
        times["step"],
        times["report"],
    )
    if saved is None:
        this.save(state)
    train(this, state, on_step)
    learned = learned_from(batches[: state.progress.steps])
    return RoundResult(material, learned, measured, bool(split.held_out), before, _report(state.progress))


@dataclass(frozen=True)
class _Begin:
    """A round before its first step.

    Args:
        material: with the teacher of all examples that the planned steps and reports need.
        before: figures of the parents, and the time that they took.
    """

    material: Material
    before: Figures
    seconds_of_report: float
    plan: Plan


def _begin(
    given: RoundInput, measured: Sequence[int], batches: Sequence[Batch], show: Callable[[str], None], started: float
) -> _Begin:
    """Measures the parents, times a step, and computes the teacher of as many steps as fit.

    Args:
        started: when the round began, in `time.monotonic`.
    """
    options = given.options
    first = batch_to_time(batches)
    began = time.monotonic()
    material = _with_teacher(given.material, {*measured, *_compared([first])}, given, show)
    a_token = (time.monotonic() - began) / sum(material.examples[index].tokens for index in material.teacher)
    require_own_tokens(material)
    show("measuring the adapters as given")
    began = time.monotonic()
    before = measured_under(material, given.scheme, measured, options)
    seconds_of_report = time.monotonic() - began
    show("timing a step")
    plan = plan_round(
        options,
        batches,
        lambda batch: _trial(material, batch, given),
        material.device,
        [a_token * tokens for tokens in _tokens_without_teacher(material, batches)],
        seconds_of_report,
        time.monotonic() - started,
    )
    material = _with_teacher(material, _compared(batches[: plan.steps]), given, show)
    return _Begin(material, before, seconds_of_report, plan)


def ended_round(given: RoundInput) -> RoundReport | None:
    """The report of a round that has ended, without a teacher; its weights are put into the model. None if it hasn't.

    Raises:
        TuneError: the checkpoint is of another run.
    """
    saved = read_checkpoint(given.checkpoint)
    if saved is None or not saved.progress.ended:
        return None
    require_same(given.checkpoint, saved.facts, given.facts)
    state = saved.put_into(given.parameters, adamw(given.parameters.values(), 1.0))
    state.use_kept()
    return _report(state.progress)


def _report(progress: Progress) -> RoundReport:
    return RoundReport(
        steps=progress.step,
        planned=progress.steps,
        kept_step=progress.step if progress.kept_step < 0 else progress.kept_step,
        stopped=progress.stopped,
        seconds=progress.seconds,
        losses=tuple(progress.losses),
        held_out=tuple(progress.held_out),
    )


def measured_under(material: Material, scheme: str, indices: Sequence[int], options: TuneOptions) -> Figures:
    """Figures of the model as it is under `non_shared`, the target, and the schemes that the options add."""
    schemes = dict.fromkeys((EXACT, scheme, *options.report_schemes))
    return {name: measure(material, name, indices, options.batch_tokens) for name in schemes}


def _with_teacher(material: Material, wanted: set[int], given: RoundInput, show: Callable[[str], None]) -> Material:
    """Adds teacher states of those of the wanted examples that have none yet."""
    missing = sorted(wanted - set(material.teacher))
    if not missing:
        return material
    require_teacher_memory(material, missing, given.sizes)

    def progress(done: int) -> None:
        show(f"the agents' own distributions: {done} of {len(missing)} trajectories")

    progress(0)
    return with_teacher(material, missing, given.options.batch_tokens, progress)


def _tokens_without_teacher(material: Material, batches: Sequence[Batch]) -> list[int]:
    """For each batch, tokens of the examples that need a teacher and have none, nor are in a batch before."""
    seen, counts = set(material.teacher), []
    for batch in batches:
        new = _compared([batch]) - seen
        counts.append(sum(material.examples[index].tokens for index in new))
        seen |= new
    return counts


def _compared(batches: Iterable[Batch]) -> set[int]:
    """Examples of the batches that compare some example with the teacher.

    A forward has the teacher's states of all its examples or of none. Gold beside results has them, at weight 0.
    """
    return {index for batch in batches if any(example.kl for example in batch.examples) for index in batch.indices}


def _trial(material: Material, batch: Batch, given: RoundInput) -> None:
    """A step that changes nothing."""
    loss_of(material, for_step(batch, 0, given.scheme, material.model.agents, given.options)).total.backward()
    for parameter in given.parameters.values():
        parameter.grad = None


def _to_json(figures: Mapping[str, Mapping[str, Agreement]]) -> dict[str, Any]:
    return {scheme: {agent: dataclasses.asdict(row) for agent, row in rows.items()} for scheme, rows in figures.items()}


def require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises TuneError if a checkpoint or a folder is of another run; names all that differs, with both values."""
    found = differences({name: before.get(name) for name in now}, now)
    if found:
        raise TuneError(
            f"{path} is of another run: {'; '.join(found.values())}", "Use its options, or start anew with --overwrite."
        )
