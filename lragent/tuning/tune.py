"""`lragent.tune`: from a model, its adapters and trajectories to adapters tuned for a sharing scheme."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lragent.artifact.directory import open_artifact
from lragent.errors import RequestError
from lragent.files.checked_file import sha256_of
from lragent.loading.stages import Stages
from lragent.program.dtypes import dtype_name
from lragent.runtime.schemes import EXACT, scheme_named
from lragent.tuning.digests import base_digest
from lragent.tuning.examples import examples_of
from lragent.tuning.folder import Existing, TuneFolder, open_folder
from lragent.tuning.material import Material, use_bfloat16
from lragent.tuning.memory import sizes_of
from lragent.tuning.options import RESUMED_WITH_OTHERS, TuneOptions
from lragent.tuning.prepare import Prepared, prepare
from lragent.tuning.read_sequences import Accepted, Skipped, read_scored_sequences
from lragent.tuning.report import (
    Given,
    RoundReport,
    TuneReport,
    options_as_json,
    read_report,
    too_few_trajectories,
    write_report,
)
from lragent.tuning.round import RoundInput, RoundResult, ended_round, measured_under, require_same, run_round
from lragent.tuning.save_adapters import round_as_saved, write_parents
from lragent.tuning.source_runs import SourceRun, source_runs
from lragent.tuning.train import TuneStep

RollOut = Callable[[Mapping[str, Path], str, Path, Path], None]


@dataclass(frozen=True)
class TuneRequest:
    """Input of a tuning run.

    Args:
        model_dir: model directory, GGUF file or hub id; adapters: agent name -> adapter directory or hub id.
        trajectories: result files, or gold files.
        out: folder of the tuned adapters.
        sharing: the target scheme.
        rounds: number of rounds. Each one after the first learns from trajectories that `roll_out` makes.
        roll_out: takes the adapters of the round before, the dtype of the model, and paths of the artifact and of the
            result file to make; both may exist.
    """

    model_dir: str | Path
    adapters: Mapping[str, str | Path]
    trajectories: tuple[Path, ...]
    out: Path
    sharing: str
    options: TuneOptions
    existing: Existing = "refuse"
    rounds: int = 1
    roll_out: RollOut | None = None


def tune(
    request: TuneRequest,
    show: Callable[[str], None] | None = None,
    on_step: Callable[[TuneStep], None] | None = None,
) -> TuneReport:
    """Tunes adapters; see `lragent.tune`.

    Args:
        show: called with the name of each stage when it begins.
        on_step: called before the first step of a round and after each.
    """
    show = show or (lambda stage: None)
    scheme_named(request.sharing)
    if request.rounds < 1 or (request.rounds > 1 and request.roll_out is None):
        raise RequestError(f"{request.rounds} rounds", "A second round needs a workflow and tasks to roll out.")
    if not request.trajectories or not request.adapters:
        raise RequestError("tune has no trajectories or no adapters", "Pass at least one of each.")
    with open_folder(request.out, request.existing, request.adapters) as folder:
        report = read_report(request.out)
        if report is None:
            report = _tune(request, folder, show, on_step)
            write_report(report)
        else:
            _require_same_request(report, request)
        shutil.rmtree(folder.work, ignore_errors=True)
    return report


def _require_same_request(ended: TuneReport, request: TuneRequest) -> None:
    """Raises TuneError if a run that has ended is another one than that which is asked for; names all that differs."""
    before: dict[str, Any] = {"sharing": ended.sharing, "agents": sorted(ended.agents)}
    now: dict[str, Any] = {"sharing": request.sharing, "agents": sorted(request.adapters)}
    if ended.given is not None:
        fixed = ended.given.options.keys() - set(RESUMED_WITH_OTHERS)
        before["options"] = {name: ended.given.options[name] for name in fixed}
        options = options_as_json(request.options)
        now["options"] = {name: options[name] for name in fixed if name in options}
    require_same(request.out, before, now)


def _tune(
    request: TuneRequest, folder: TuneFolder, show: Callable[[str], None], on_step: Callable[[TuneStep], None] | None
) -> TuneReport:
    runs = source_runs(request.trajectories)
    prepared = prepare(request.model_dir, request.adapters, runs, request.options, folder.parents, Stages(show))
    parents = _copies(prepared.parameters)
    reports: list[RoundReport] = []
    result: RoundResult | None = None
    for number in range(1, request.rounds + 1):
        given, notes = _round_input(request, folder, prepared, number, {} if number == 1 else parents)
        last = number == request.rounds
        ended = None if last else ended_round(given)
        if ended is None:
            result = run_round(given, show, on_step)
            ended = result.report
        reports.append(ended)
        if not last:
            show("rolling out the tuned agents")
            _save(request, prepared, reports, folder.adapters(number))
            assert request.roll_out is not None
            adapters = {agent: folder.adapters(number) / agent for agent in request.adapters}
            dtype = dtype_name(prepared.loaded.dtype)
            request.roll_out(adapters, dtype, folder.artifact(number + 1), folder.results(number + 1))
    assert result is not None
    round_as_saved(prepared.model, prepared.parents)
    show("measuring the tuned adapters")
    after = measured_under(result.material, request.sharing, result.measured, request.options)
    show("writing the adapters")
    _save(request, prepared, reports, request.out)
    return TuneReport(
        out=request.out,
        sharing=request.sharing,
        agents=tuple(request.adapters),
        trajectories=len(result.learned),
        measured=len(result.measured),
        held_out=result.held_out,
        rounds=tuple(reports),
        before=result.before,
        after=after,
        notes=(
            *prepared.notes,
            *_run_notes(runs, request.sharing),
            *notes,
            *_round_notes(reports, request.options),
            *filter(None, (too_few_trajectories(reports[-1], after[request.sharing]),)),
        ),
        given=_given(request),
    )


def _round_input(
    request: TuneRequest, folder: TuneFolder, prepared: Prepared, number: int, parents: Mapping[str, Tensor]
) -> tuple[RoundInput, tuple[str, ...]]:
    """The input of a round and sentences on what its trajectories leave out.

    The model has the weights with which the round begins. It gets the parents' ones, with which the teacher computes.

    Args:
        parents: weights of the adapters as given, in a round after the first.
    """
    files, digests = request.trajectories, prepared.digests
    if number > 1:
        files = (folder.results(number),)
        tuned = open_artifact(folder.artifact(number)).manifest.agents
        digests = {agent.name: frozenset((agent.digest,)) for agent in tuned}
    loaded = prepared.loaded
    read, skipped = read_scored_sequences(files, Accepted(digests, loaded.vocab_size, loaded.max_positions))
    start = _copies(prepared.parameters) if parents else {}
    for name, value in parents.items():
        prepared.parameters[name].data.copy_(value)
    device = next(iter(prepared.parameters.values())).device
    bfloat16 = use_bfloat16(request.options.arithmetic, loaded.dtype, device)
    trained = sum(parameter.numel() for parameter in prepared.parameters.values())
    given = RoundInput(
        material=Material(
            prepared.model, loaded.vocab_size, examples_of(read, request.options, request.sharing), {}, bfloat16
        ),
        parameters=prepared.parameters,
        start=start,
        scheme=request.sharing,
        options=request.options,
        sizes=sizes_of(loaded, prepared.model, trained),
        checkpoint=folder.checkpoint(number),
        facts=_facts(request, prepared, files, number),
    )
    return given, _skipped_notes(skipped, number)


def _facts(request: TuneRequest, prepared: Prepared, files: Sequence[Path], number: int) -> dict[str, Any]:
    """All that must be the same when a round is resumed, as JSON gives it back."""
    options = dataclasses.asdict(request.options)
    facts = {
        "round": number,
        "sharing": request.sharing,
        "options": {name: value for name, value in options.items() if name not in RESUMED_WITH_OTHERS},
        "model": base_digest(prepared.loaded),
        "adapters": dict(prepared.digest_of),
        "trajectories": [sha256_of(file) for file in files],
        "dtype": dtype_name(prepared.loaded.dtype),
        "torch": version("torch"),
    }
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


def _given(request: TuneRequest) -> Given:
    adapters = {agent: str(source) for agent, source in request.adapters.items()}
    options = options_as_json(request.options)
    return Given(str(request.model_dir), adapters, tuple(map(str, request.trajectories)), options)


def _save(request: TuneRequest, prepared: Prepared, reports: Sequence[RoundReport], out: Path) -> None:
    """Writes one directory an agent."""
    write_parents(
        prepared.parents,
        prepared.model,
        out,
        request.sharing,
        prepared.digest_of,
        dtype_name(prepared.loaded.dtype),
        steps=sum(report.kept_step for report in reports),
    )


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _run_notes(runs: Sequence[SourceRun], sharing: str) -> tuple[str, ...]:
    return tuple(
        f"{run.file} was rolled out under {run.sharing}: agents that sharing led astray there are poor examples"
        for run in runs
        if run.sharing not in ("", EXACT)
    )


def _skipped_notes(skipped: Skipped, number: int) -> tuple[str, ...]:
    where = "" if number == 1 else f"round {number}: "
    return tuple(f"{where}{sentence}" for sentence in skipped.sentences())


def _round_notes(reports: Sequence[RoundReport], options: TuneOptions) -> tuple[str, ...]:
    notes = []
    for number, report in enumerate(reports, start=1):
        where = f"round {number}: " if len(reports) > 1 else ""
        if report.planned < options.steps:
            notes.append(f"{where}{report.planned} of {options.steps} steps fit into {options.minutes:g} minutes")
        if report.stopped:
            reason = "the time was over" if report.stopped == "time" else "held-out trajectories showed no improvement"
            notes.append(f"{where}ended after {report.steps} of {report.planned} steps: {reason}")
        if report.kept_step == 0:
            notes.append(f"{where}every step made the adapters worse on held-out trajectories: they stay as they were")
        elif report.kept_step < report.steps:
            notes.append(f"{where}kept the weights of step {report.kept_step}: later ones are worse on those held out")
    return tuple(notes)
