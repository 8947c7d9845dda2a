"""Exact match of adapter sets under sharing schemes, with 95% intervals.

    python -m examples.fact_world.accuracy --model MODEL_DIR --work DIR [--rows NAME,...] [--tasks N]

DIR holds everything that it makes: the ordinary set of adapters, trajectories under `non_shared`, tuned adapters,
artifacts, one result file a row. A command that was interrupted goes on when it is started again, also in the middle
of a tuning or of a row. A task that failed counts as wrong. Rows and numbers of tasks: `accuracy_rows.py`.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import lragent
from examples.fact_world.accuracy_rows import BARS, ORDINARY, PADDED_TOKENS, ROWS, SHIPPED, TUNINGS, Row, Tuning
from examples.fact_world.format import ROLES
from examples.fact_world.intervals import paired_difference, wilson
from examples.fact_world.padding import padded
from examples.fact_world.train import ordinary_recipe, train
from examples.fact_world.training_data import tokenizer_of
from examples.fact_world.world import DEFAULT_SEED, make_tasks
from lragent.rollouts.kept_results import read_results
from lragent.tuning.options import TuneOptions

HERE = Path(__file__).parent
WORKFLOW = f"{HERE / 'workflow.py'}:workflow"
TRAIN_TASKS = 90
CONCURRENCY = 8
KV_MEMORY = "4GiB"
UNLIMITED = 600.0  # minutes
TUNING_NAMED = {tuning.name: tuning for tuning in TUNINGS}


class Study:
    """The files of one folder, made when they are first asked for."""

    def __init__(self, model: Path, work: Path, dtype: str, threads: int | None) -> None:
        self.model, self.work, self.dtype, self.threads = model, work, dtype, threads
        work.mkdir(parents=True, exist_ok=True)

    def adapters(self, name: str) -> dict[str, Path]:
        """Adapter directories of a set; a set that is not there is trained or tuned."""
        if name == SHIPPED:
            return {role: HERE / "adapters" / role for role in ROLES}
        if name == ORDINARY:
            return {role: self._trained(role) for role in ROLES}
        out = self.work / "tuned" / name
        if not (out / "tune_report.json").exists():
            self._tune(TUNING_NAMED[name], out)
        return {role: out / role for role in ROLES}

    def _trained(self, role: str) -> Path:
        """An adapter of the ordinary set."""
        out = self.work / ORDINARY
        if not (out / role / "training_log.json").exists():
            print(f"training {ORDINARY} {role}", flush=True)
            command = f"python -m examples.fact_world.train --model MODEL_DIR --role {role} --ordinary"
            train(ordinary_recipe(role), self.model, out, DEFAULT_SEED, command)
        return out / role

    def _tune(self, tuning: Tuning, out: Path) -> None:
        options = TuneOptions(add_modules=tuning.add_modules, dtype=self.dtype)
        if tuning.steps_of:
            self.adapters(tuning.steps_of)
            report = json.loads((self.work / "tuned" / tuning.steps_of / "tune_report.json").read_text())
            options = replace(options, steps=report["rounds"][0]["planned"], minutes=UNLIMITED)
        print(f"tuning {tuning.name}", flush=True)
        lragent.tune(
            self.model,
            self.adapters(tuning.parent),
            self.gold() if tuning.gold else self.trajectories(tuning.parent),
            out,
            sharing=tuning.sharing,
            options=options,
            existing="resume" if out.exists() else "refuse",
            threads=self.threads,
        )

    def trajectories(self, name: str) -> Path:
        """Results of a set on training tasks under `non_shared`."""
        return self._roll_out(Row(name, "non_shared", TRAIN_TASKS), "train")

    def gold(self) -> Path:
        """Gold trajectories of the same training tasks."""
        from examples.fact_world.gold_file import write_gold

        path = self.work / "gold.jsonl"
        if not path.exists():
            write_gold(self.model, "train", TRAIN_TASKS, path)
        return path

    def results(self, row: Row) -> Path:
        """The finished result file of a row."""
        return self._roll_out(row, "test")

    def _roll_out(self, row: Row, split: str) -> Path:
        name = row.name if split == "test" else f"{split}.{row.name}"
        tasks = self.work / f"{split}-{row.tasks}{'-padded' if row.padded else ''}.jsonl"
        out = self.work / f"{name}.jsonl"
        if not tasks.exists():
            made = make_tasks(split, row.tasks)
            if row.padded:
                tokenize = tokenizer_of(self.model)
                made = [padded(task, PADDED_TOKENS, tokenize) for task in made]
            tasks.write_text("".join(f"{json.dumps(task)}\n" for task in made), encoding="utf-8")
        if out.exists() and sum(1 for _ in read_results(out)) == row.tasks:
            return out
        engine = lragent.load(self.artifact(row.adapters), row.sharing, KV_MEMORY, threads=self.threads)
        print(f"rolling out {name}", flush=True)
        lragent.rollout(engine, WORKFLOW, tasks, out, existing="resume", concurrency=CONCURRENCY)
        return out

    def artifact(self, name: str) -> Path:
        """The artifact of a set. Sets with the same modules share compiled files; only adapter weights differ."""
        path = self.work / f"{name.replace(' ', '-')}.lragent"
        if path.exists():
            return path
        adapters: Mapping[str, Path] = self.adapters(name)
        tuning = TUNING_NAMED.get(name)
        if tuning is None or tuning.add_modules:
            lragent.convert(self.model, adapters, path, dtype=self.dtype, layouts=("split", "dense"))
            return path
        scratch = path.with_suffix(".part")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(self.artifact(tuning.parent), scratch, copy_function=os.link)
        lragent.update(scratch, self.model, adapters)
        scratch.rename(path)
        return path


def exact_matches(results: Path) -> dict[str, bool]:
    """Task id -> True if its answer is right; an error is not."""
    lines = read_results(results)
    return {line["id"]: line["error"] is None and bool(line["result"]["exact_match"]) for line in lines}


def table_row(row: Row, results: Path) -> str:
    """A row of the table in Markdown."""
    right = exact_matches(results)
    low, high = wilson(sum(right.values()), len(right))
    share = sum(right.values()) / len(right)
    tasks = f"{len(right)}, padded" if row.padded else f"{len(right)}"
    return f"| {row.adapters} | `{row.sharing}` | {tasks} | {share:.1%} | {low:.1%} to {high:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", default="", help=f"names of rows, all by default: {', '.join(r.name for r in ROWS)}")
    parser.add_argument("--tasks", type=int, default=0, help="fewer tasks than a row has, for a quick look")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    names = set(filter(None, options.rows.split(",")))
    unknown = names - {row.name for row in ROWS}
    if unknown:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    chosen = [row for row in ROWS if not names or row.name in names]
    study = Study(options.model, options.work, options.dtype, options.threads)
    found: dict[Row, Path] = {}
    print("| adapters | scheme | tasks | exact match | 95% interval |\n|---|---|---|---|---|")
    for row in chosen:
        fewer = replace(row, tasks=min(options.tasks or row.tasks, row.tasks))
        found[row] = study.results(fewer)
        print(table_row(row, found[row]), flush=True)
    print("\n| difference, paired by task | points | 95% interval |\n|---|---|---|")
    for bar in BARS:
        if bar.left in found and bar.right in found:
            left, right = exact_matches(found[bar.left]), exact_matches(found[bar.right])
            tasks = [task for task in left if task in right]
            difference, low, high = paired_difference([left[t] for t in tasks], [right[t] for t in tasks])
            print(f"| {bar.name} | {100 * difference:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} |")


if __name__ == "__main__":
    main()
