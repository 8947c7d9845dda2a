"""The entry points: `convert`, `load`, `optimize`, `inspect`. Read top to bottom, this is the flow of the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lragent.errors import RequestError, SplitRefused
from lragent.loading.stages import Progress, Stages
from lragent.program.defaults import ATTENTION, BACKEND, DEVICE, KV_MEMORY, MAX_BATCH_TOKENS, SHARING
from lragent.program.dtypes import LAYOUTS, dtype_named

if TYPE_CHECKING:
    from lragent.artifact.build import ConvertReport
    from lragent.program.cache_schema import Layout
    from lragent.reports.inspection import Inspection
    from lragent.reports.verification import Verification
    from lragent.rollouts.jsonl import Existing
    from lragent.rollouts.run import RolloutSummary
    from lragent.runtime import RolloutResult, Workflow
    from lragent.runtime.engine import Engine


def convert(
    model_dir: str | Path,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    dtype: str = "auto",
    layouts: Sequence[Layout] = ("split",),
    attention: str = "auto",
    overwrite: bool = False,
    compiled: bool = True,
    progress: Progress | None = None,
    spare: int = 0,
    unit: str = "model",
) -> ConvertReport:
    """Model directory + adapters -> artifact.

    Args:
        adapters: agent name -> PEFT adapter directory.
        layouts: which are compiled for this machine now; the other is compiled when it is first loaded.
        attention: name of the implementation that layouts are compiled with, or "auto".
        compiled: False writes the programs only (then no C++ compiler is needed).
        progress: is told the name of each stage as it begins.
        spare: slots kept free for agents that `update` may add.
        unit: what is compiled at once: the "model", or each kind of "layer", which takes time that does not grow with
            depth; a model that can't be cut is compiled whole, and the report says why.

    Raises:
        UserError: one of its kinds, which says what was found, where, and what to do; nothing is left behind.
    """
    from lragent.artifact.build import BuildOptions, build
    from lragent.compile.compile import require_unit
    from lragent.kernels.dispatch import require_attention, resolve
    from lragent.loading.agent_slots import agent_slots_of, fit
    from lragent.loading.model import load_directories

    for layout in layouts:
        if layout not in LAYOUTS:
            raise RequestError(f"unknown layout {layout!r}", f"Use {' or '.join(LAYOUTS)}.")
    require_unit(unit)
    require_attention(attention, "cpu")
    now = tuple(layouts) if compiled else ()
    if now:
        attention = resolve(attention, "cpu")
    stages = Stages(progress)
    loaded = stages.run("load", lambda: load_directories(model_dir, adapters, dtype))
    if spare > 0:
        loaded = fit(loaded, agent_slots_of(loaded, spare))
    options = BuildOptions(compiled=now, attention=attention, unit=unit, overwrite=overwrite)
    return build(loaded, Path(out), options=options, stages=stages, wanted=layouts)


def update(
    path: str | Path,
    model_dir: str | Path,
    adapters: Mapping[str, str | Path],
    progress: Progress | None = None,
) -> ConvertReport:
    """Gives an artifact other adapters of the same form; its compiled programs stay.

    Args:
        adapters: all agents that there are afterwards: replaced, added to spare slots, or, where not named, removed.

    Raises:
        UserError: one of its kinds; the artifact is then as it was.
    """
    from lragent.artifact.update import update as update_artifact

    return update_artifact(Path(path), model_dir, adapters, Stages(progress))


def load(
    path: str | Path,
    sharing: str = SHARING,
    kv_memory: int | str = KV_MEMORY,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    backend: str = BACKEND,
    attention: str = ATTENTION,
    device: str = DEVICE,
    threads: int | None = None,
    kv_dtype: str = "auto",
    allow_compiled: bool = True,
    agents: Sequence[str] | None = None,
) -> Engine:
    """Opens an artifact as an engine.

    Args:
        sharing: sharing scheme; it decides which of the two programs is run.
        kv_memory: bytes, or text such as "2GiB".
        backend: "compiled"; "eager", which runs op by op (on a GPU as CUDA graphs where Triton is installed) and needs
            no C++ compiler; "auto": compiled on a CPU, eager on a GPU. On a GPU, "compiled" runs each package in a
            child process first.
        allow_compiled: False compiles again instead of running machine code from the artifact.
        agents: agents that will act besides `base`; the cache stores no LR values of others. None: all agents.

    Raises:
        ArtifactError, RequestError, CompilerMissing, SplitRefused: say what was found, where, and what to do.
    """
    from lragent.artifact.directory import open_artifact
    from lragent.artifact.open import program_of_artifact, resolve_backend
    from lragent.artifact.tokenizer import tokenizer_of
    from lragent.compile.devices import device_named
    from lragent.kernels.dispatch import resolve
    from lragent.runtime.config import EngineConfig
    from lragent.runtime.engine import Engine

    place = device_named(device)
    config = EngineConfig(sharing, kv_memory, max_batch_tokens, device=place, agents=agents, threads=threads)
    layout = config.scheme.layout
    backend = resolve_backend(backend, place)
    artifact = open_artifact(path)
    manifest = artifact.manifest
    if layout not in manifest.layouts:
        raise SplitRefused(
            f"{path} has no {layout} program, which {sharing} needs: {manifest.refusal}",
            "Use sharing non_shared or full_shared.",
            manifest.refused,
        )
    cache_dtype = dtype_named(manifest.dtype if kv_dtype == "auto" else kv_dtype)
    chosen = resolve(attention, device)
    return Engine(
        program_of_artifact(artifact, manifest.layouts[layout], backend, chosen, place, cache_dtype, allow_compiled),
        replace(
            config, page_size=manifest.page_size, kv_dtype=cache_dtype, stop_token_ids=tuple(manifest.stop_token_ids)
        ),
        tokenizer_of(artifact),
    )


def optimize(
    peft_model: Any,
    sharing: str = SHARING,
    tokenizer: str | Path | None = None,
    kv_memory: int | str = KV_MEMORY,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    backend: str = BACKEND,
    attention: str = ATTENTION,
    threads: int | None = None,
    unit: str = "model",
) -> Engine:
    """A live PEFT model -> an engine; the model is not changed and shares its weights with the engine.

    Args:
        tokenizer: a transformers tokenizer, or a directory with tokenizer files; None: token ids only.
        backend: "compiled", "eager", or "auto", which is "compiled" (see `load`).
        unit: what is compiled at once, see `convert`.

    Raises:
        UserError: one of its kinds, which says what was found, where, and what to do.
    """
    from lragent.artifact.build import BuildOptions, write
    from lragent.artifact.open import resolve_backend
    from lragent.artifact.tokenizer import tokenizer_from
    from lragent.compile.compile import require_unit
    from lragent.compile.export import CPU
    from lragent.compile.live_program import program_of_model
    from lragent.kernels.dispatch import resolve
    from lragent.loading.model import load_live
    from lragent.passes.pipeline import rewrite
    from lragent.runtime.config import EngineConfig
    from lragent.runtime.engine import Engine

    config = EngineConfig(sharing, kv_memory, max_batch_tokens, device=CPU, threads=threads)
    layout = config.scheme.layout
    backend = resolve_backend(backend, CPU)
    require_unit(unit)
    chosen = resolve(attention, "cpu")
    loaded = load_live(peft_model)
    rewritten = rewrite(loaded, (layout,), Stages())

    def save(out: Path) -> None:
        compiled = (layout,) if backend == "compiled" else ()
        options = BuildOptions(compiled=compiled, attention=chosen, unit=unit)
        write(loaded, rewritten, out, options=options, stages=Stages())

    return Engine(
        program_of_model(loaded, rewritten.programs[layout], backend, chosen, loaded.dtype, unit),
        replace(config, kv_dtype=loaded.dtype, stop_token_ids=tuple(loaded.stop_token_ids)),
        tokenizer_from(tokenizer),
        save,
    )


def rollout(
    engine: Engine,
    workflow: Workflow | str,
    tasks: str | Path,
    out: str | Path,
    existing: Existing = "refuse",
    concurrency: int = 32,
    on_result: Callable[[RolloutResult], None] | None = None,
) -> RolloutSummary:
    """Runs a workflow over a file of tasks; every finished task becomes one line of a result file at once.

    Args:
        workflow: `async def workflow(task, t) -> dict`, or "FILE.py:FUNC".
        tasks: JSON lines, one object a task; "id" names the task, else its line number does.
        out: JSON lines, one object a finished task.
        existing: what happens to a file at `out`: "refuse" raises, "resume" keeps its results and runs the other
            tasks, "overwrite" drops them.
        concurrency: largest number of tasks in progress at a time.
        on_result: called with every result after its line was written.

    Raises:
        RequestError, TaskFileError: say what was found, where, and what to do.
    """
    from lragent.rollouts.run import run_rollout
    from lragent.rollouts.workflow_loading import open_workflow

    with open_workflow(workflow) if isinstance(workflow, str) else nullcontext(workflow) as function:
        return run_rollout(engine, function, Path(tasks), Path(out), existing, concurrency, on_result)


def verify(
    path: str | Path,
    model_dir: str | Path,
    adapters: Mapping[str, str | Path],
    prompts: Sequence[str] | None = None,
    schemes: Sequence[str] = ("non_shared", "base_lr_shared"),
    new_tokens: int = 32,
    tolerance: float | None = None,
    engine_for: Callable[[str], Engine] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compares greedy turns of an artifact's agents with PEFT in float32, after a check of the files' hashes.

    Args:
        model_dir, adapters: the files from which the artifact was converted.
        prompts: texts that the turns continue; None: three short ones.
        new_tokens: tokens generated for each prompt.
        tolerance: largest accepted difference of log-probabilities. None: 0.001; for an artifact of 16 bits, twice the
            error of PEFT in that dtype if that is more.
        engine_for: opens the artifact with a sharing scheme; None: `load` with its defaults.
        progress: called with the name of each stage when it begins.

    Raises:
        AdapterError, ArtifactError, RequestError: say what was found, where, and what to do.
    """
    from lragent.reports import verification

    return verification.verify(
        Path(path),
        Path(model_dir),
        {name: Path(folder) for name, folder in adapters.items()},
        engine_for or partial(load, path),
        prompts=verification.PROMPTS if prompts is None else prompts,
        schemes=schemes,
        new_tokens=new_tokens,
        tolerance=tolerance,
        progress=progress,
    )


def inspect(path: str | Path, adapters: Mapping[str, str | Path] | None = None) -> Inspection:
    """What an artifact holds, or what a model directory with adapters would become (a dry run).

    Raises:
        UserError: one of its kinds.
    """
    from lragent.reports.inspection import inspect_artifact, inspect_model

    return inspect_artifact(Path(path)) if adapters is None else inspect_model(Path(path), adapters)
