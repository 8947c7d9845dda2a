"""Loss of sharing over extra compute: sharing schemes and a selective recompute, with several adapter sets.

    python -m examples.fact_world.curve --model MODEL_DIR --trajectories RESULTS.jsonl --work curve.jsonl \\
        --adapters-set shipped=examples/fact_world/adapters --adapters-set tuned=TUNED_DIR [--most 16]

Each trajectory runs once for each point, teacher-forced, and is compared with the first set under `non_shared`, which
must have rolled the trajectories out. The selective recompute (docs/training.md) is measured with the first set only.
What is measured goes into the file --work; a command that was interrupted goes on when it is started again.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.fact_world.curve_points import (
    RULES,
    AdapterSet,
    AgentSums,
    Point,
    Sums,
    log_probabilities,
    measure_points,
    open_set,
    points_of,
)
from examples.fact_world.curve_report import CurveRow, Measured, curve_page, curve_rows, markdown
from lragent.errors import UserError
from lragent.rollouts.turn_sequences import read_turn_sequences
from lragent.runtime.schemes import EXACT, SCHEMES
from lragent.training.schemes import rows_of
from lragent.training.turn_sequence import TurnSequence
from lragent.tuning.source_runs import run_dtype, source_runs

Key = tuple[str, ...]


class Work:
    """The file of sums: a line for each adapter set, point and trajectory. Lines of other sets or trajectories stay."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[Key, Sums] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was cut off is measured again
        path.write_text(whole, encoding="utf-8")
        for line in map(json.loads, whole.splitlines()):
            agents = {name: AgentSums(**sums) for name, sums in line["sums"].pop("agents").items()}
            self._sums[tuple(line["key"])] = Sums(**line["sums"], agents=agents)

    def get(self, key: Key) -> Sums | None:
        return self._sums.get(key)

    def add(self, key: Key, sums: Sums) -> None:
        self._sums[key] = sums
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": list(key), "sums": dataclasses.asdict(sums)}) + "\n")


def short(value: Any) -> str:
    """A digest of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def key_of(teacher: AdapterSet, measured: AdapterSet, sequence: TurnSequence, point: Point) -> Key:
    """All that a line's sums depend on."""
    turns = [dataclasses.astuple(turn) for turn in sequence.turns]
    sets = [short(sorted(one.digests.items())) for one in (teacher, measured)]
    return (*sets, measured.dtype, short([sequence.token_ids, turns]), point.name)


def sequences_of(file: Path, teacher: AdapterSet, most: int) -> tuple[TurnSequence, ...]:
    """Trajectories of the teacher, spread over the file.

    Raises:
        TaskFileError: the file can't be read, or is of other agents.
        ValueError: they were rolled out by other adapters, or under another scheme.
    """
    read = read_turn_sequences(file, teacher.digests, teacher.vocab_size, teacher.max_positions)
    if read.other_adapters:
        raise ValueError(f"{file}: {read.other_adapters} turns are of other adapters than the first set")
    schemes = {run.sharing for run in source_runs([file])} - {EXACT}
    if schemes:
        raise ValueError(f"{file} was rolled out under {', '.join(schemes)}, not {EXACT}")
    return read.spread(most).sequences


def measure_set(
    teacher: AdapterSet, measured: AdapterSet, sequences: Sequence[TurnSequence], points: Sequence[Point], work: Work
) -> list[Measured]:
    """Measures what the file lacks; gives the sums over all trajectories."""
    for number, sequence in enumerate(sequences, start=1):
        missing = [point for point in points if work.get(key_of(teacher, measured, sequence, point)) is None]
        if missing:
            print(f"{measured.name}: trajectory {number} of {len(sequences)}", flush=True)
            teacher_RV = log_probabilities(teacher, sequence)
            for point, sums in measure_points(measured, teacher_RV, sequence, missing):
                work.add(key_of(teacher, measured, sequence, point), sums)
    found = []
    for point in points:
        parts = [work.get(key_of(teacher, measured, sequence, point)) for sequence in sequences]
        total = Sums(0.0, 0, 0, {})
        for part in parts:
            assert part is not None
            total = total.plus(part)
        found.append(Measured(measured.name, point, total, measured.bytes_per_token(total, point)))
    return found


def computed_tokens(sequences: Iterable[TurnSequence], agents: Sequence[str]) -> Mapping[str, int]:
    """Tokens that the cheapest scheme and the exact one compute."""
    sequences = tuple(sequences)
    return {
        name: sum(len(rows_of(name, [sequence], agents).token_ids_N) for sequence in sequences)
        for name in ("full_shared", EXACT)
    }


def curve(
    model: Path,
    sets: Mapping[str, Path],
    trajectories: Path,
    work: Work,
    shares: Sequence[float],
    rules: Sequence[str] = RULES,
    most: int = 16,
    dtype: str = "auto",
    schemes: Sequence[str] = tuple(SCHEMES),
) -> tuple[list[CurveRow], str]:
    """The rows, and a sentence on what was measured.

    Args:
        sets: name -> folder with one adapter directory a role; the first is the teacher.
        dtype: of the weights; "auto": that of the run that wrote the trajectories.
        schemes: measured with the sets after the first.
    """
    dtype = run_dtype(source_runs([trajectories]), dtype)
    names = list(sets)
    teacher = open_set(names[0], model, sets[names[0]], dtype)
    sequences = sequences_of(trajectories, teacher, most)
    points, others = points_of(shares, rules), [Point(scheme) for scheme in schemes]
    found: list[Measured] = []
    for name in names:
        measured = teacher if name == teacher.name else open_set(name, model, sets[name], dtype)
        found += measure_set(teacher, measured, sequences, points if measured is teacher else others, work)
    total = found[0].sums.total
    note = (
        f"{len(sequences)} trajectories, {total.tokens} generated tokens, {total.turns} turns, {teacher.dtype}; "
        f"compared with {teacher.name} under {EXACT}"
    )
    return curve_rows(found, computed_tokens(sequences, teacher.model.agents), teacher.name), note


def named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument(
        "--adapters-set", type=named_folder, action="append", required=True, help="NAME=DIR; the first is the teacher"
    )
    parser.add_argument("--trajectories", type=Path, required=True, help="results of the first set under non_shared")
    parser.add_argument("--work", type=Path, required=True, help="file of what is measured; goes on where it ended")
    parser.add_argument("--most", type=int, default=16, help="trajectories, spread over the file")
    parser.add_argument("--shares", default="0.1,0.25,0.5", help="of tokens that the acting agent recomputes")
    parser.add_argument("--rules", default=",".join(RULES), help="rules that choose them")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="measured with the sets after the first")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="writes the rows")
    parser.add_argument("--html", type=Path, help="writes a page with a chart")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rules, schemes = options.rules.split(","), options.schemes.split(",")
    for name, given, known in (("--rules", rules, RULES), ("--schemes", schemes, SCHEMES)):
        if set(given) - set(known):
            parser.error(f"{name} is {','.join(given)}; known are {', '.join(known)}")
    sets = dict(options.adapters_set)
    if len(sets) < len(options.adapters_set):
        parser.error("two adapter sets have the same name")
    shares = [float(share) for share in options.shares.split(",")]
    try:
        work = Work(options.work)
        rows, note = curve(
            options.model, sets, options.trajectories, work, shares, rules, options.most, options.dtype, schemes
        )
    except (UserError, ValueError) as error:
        parser.error(str(error))
    print(f"\n{markdown(rows)}\n\n{note}")
    if options.json:
        written = {"note": note, "points": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(written, indent=1), encoding="utf-8")
    if options.html:
        options.html.write_text(curve_page(rows, note), encoding="utf-8")


if __name__ == "__main__":
    main()
