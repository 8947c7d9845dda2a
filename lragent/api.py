"""The Python API in the order of the flow: convert, update, load, optimize, rollout, tune, verify, drift, inspect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lragent.errors import RequestError, SplitRefused
from lragent.files.user_path import user_path
from lragent.loading.stages import Progress, Stages
from lragent.program.defaults import (
    ATTENTION,
    AUTO,
    BACKEND,
    DEVICE,
    KV_MEMORY,
    MAX_BATCH_TOKENS,
    MAX_KL,
    SHARING,
    TUNED_SHARING,
)
from lragent.program.dtypes import LAYOUTS, dtype_named

if TYPE_CHECKING:
    from lragent.artifact.build import ConvertReport
    from lragent.artifact.directory import Artifact
    from lragent.program.cache_schema import Layout
    from lragent.reports.drift_report import DriftReport
    from lragent.reports.inspection import Inspection
    from lragent.reports.verification import Verification
    from lragent.rollouts.kept_results import Existing
    from lragent.rollouts.run import RolloutSummary
    from lragent.runtime import RolloutResult, Workflow
    from lragent.runtime.engine import Engine
    from lragent.training.shared_model import SharedModel
    from lragent.tuning.folder import Existing as TuneExisting
    from lragent.tuning.options import TuneOptions
    from lragent.tuning.report import TuneReport
    from lragent.tuning.train import TuneStep

log = logging.getLogger(__name__)


def convert(
    model_dir: str | Path,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    dtype: str = "auto",
    layouts: Sequence[Layout] | None = None,
    attention: str = "auto",
    overwrite: bool = False,
    compiled: bool = True,
    progress: Progress | None = None,
    spare: int = 0,
    unit: str = "model",
) -> ConvertReport:
    """Converts a model directory and its adapters into an artifact.

    Args:
        model_dir: model directory, GGUF file, or hub id (OWNER/NAME, OWNER/NAME@REVISION). An existing path wins. Of a
            repository on the hub, weights, config and tokenizer files are downloaded, and no code; the artifact keeps
            the commit.
        adapters: agent name -> PEFT adapter directory or hub id.
        out: directory of the artifact.
        dtype: "float32", "bfloat16", "float16", or "auto": that of the checkpoint. GGUF becomes float32, and float16
            becomes bfloat16 on a CPU without float16 arithmetic; the report says so.
        layouts: cache layouts to compile for this machine now. Others are compiled when they are first loaded. None:
            the layout that `load` uses by default: that of the scheme that the adapters were tuned for, else "dense".
        attention: attention implementation of the compiled layouts, or "auto".
        overwrite: True to replace an existing artifact at `out`.
        compiled: False to write the programs without compiling them; no C++ compiler is needed then.
        progress: called with the name of each stage when it begins.
        spare: number of spare agent slots, for agents that `update` adds later.
        unit: "model": compile the model as one package. "layer": compile identical layers once; compile time is
            independent of depth. A model that can't be cut into layers is compiled as one package, and the report gives
            the reason.

    Returns:
        A report of agents, stages, sizes and misses.

    Raises:
        ModelError, AdapterError: the model or an adapter can't be used.
        SplitRefused: an adapter can't be routed, or split layout is refused (unless `layouts` leaves it out).
        ArtifactError: `out` exists and `overwrite` is False, or can't be written.
        CompilerMissing, NoSpace: compilation is not possible.
        RequestError: an argument is not valid.
        On any error, no partial artifact is left.
    """
    from lragent.artifact.build import BuildOptions, build
    from lragent.artifact.sharing_choice import layout_of_auto
    from lragent.compile.compile import require_unit
    from lragent.kernels.dispatch import require_attention, resolve
    from lragent.loading.agent_slots import agent_slots_of, fit
    from lragent.loading.model import load_directories

    for layout in layouts or ():
        if layout not in LAYOUTS:
            raise RequestError(f"unknown layout {layout!r}", f"Use {' or '.join(LAYOUTS)}.")
    require_unit(unit)
    require_attention(attention, "cpu")
    if compiled and (layouts is None or layouts):
        attention = resolve(attention, "cpu")
    stages = Stages(progress)
    loaded = stages.run("load", lambda: load_directories(model_dir, adapters, dtype))
    if spare > 0:
        loaded = fit(loaded, agent_slots_of(loaded, spare))
    now = (layout_of_auto(loaded.agents),) if layouts is None else tuple(layouts)
    options = BuildOptions(now if compiled else (), attention, unit, overwrite)
    wanted: Sequence[Layout] = ("split",) if layouts is None else layouts
    return build(loaded, user_path(out), options=options, stages=stages, wanted=wanted)


def update(
    path: str | Path,
    model_dir: str | Path,
    adapters: Mapping[str, str | Path],
    progress: Progress | None = None,
) -> ConvertReport:
    """Changes the adapters of an artifact without recompiling.

    Args:
        path: the artifact.
        model_dir: the base model that the artifact was converted from, as a path or a hub id. An id without a revision
            is the commit that the artifact was converted from.
        adapters: agent name -> PEFT adapter directory or hub id, for all agents after the update. A present agent is
            replaced, a new one takes a spare agent slot, and one that is not named is removed.
        progress: called with the name of each stage when it begins.

    Raises:
        AdapterError: an adapter does not fit its agent slot, or there are more agents than slots.
        ArtifactError: the base model, the version or the compiled program differs.
        On any error, the artifact is unchanged.
    """
    from lragent.artifact.update import update as update_artifact

    return update_artifact(user_path(path), model_dir, adapters, Stages(progress))


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
    spare: int = 0,
    max_kl: float = MAX_KL,
) -> Engine:
    """Opens an artifact as an engine.

    Args:
        path: the artifact.
        sharing: sharing scheme; it determines the cache layout and thereby the program. "auto": the scheme that the
            adapters were tuned for; else the cheapest one whose drift (`drift`) is at most `max_kl`; else "non_shared",
            and a log line says what sharing would save.
        kv_memory: size of the cache in bytes, or text such as "2GiB".
        max_batch_tokens: largest number of tokens per step.
        backend: "compiled"; "eager", which runs op by op (on a GPU as CUDA graphs where Triton is installed) and needs
            no C++ compiler; "auto": compiled on a CPU, eager on a GPU. On a GPU, "compiled" first tests each package in
            a child process.
        attention: attention implementation, or "auto".
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of torch, for the whole process; None: unchanged.
        kv_dtype: dtype of the cache; "auto": that of the weights.
        allow_compiled: False to compile again instead of running machine code from the artifact.
        agents: agents that will act besides `base`; the cache stores LR values only for these. None: all agents.
        spare: spare agent slots (`convert(spare=...)`) that get LR blocks in the cache, for new versions of adapters
            (`Engine.update_adapters`).
        max_kl: largest drift that counts as no loss, in nats per token of the agent that drifts most.

    Raises:
        ArtifactError: the artifact is missing, damaged or of another version.
        SplitRefused: the scheme needs a layout that the artifact lacks.
        CompilerMissing: a program must be compiled, but there is no C++ compiler.
        CacheMemoryError: the cache is too small or can't be allocated.
        RequestError: an argument is not valid.
    """
    from lragent.artifact.directory import open_artifact
    from lragent.artifact.open import program_of_artifact, resolve_backend
    from lragent.artifact.sharing_choice import choice_of_artifact, require_sharing
    from lragent.artifact.tokenizer import tokenizer_of
    from lragent.compile.devices import device_named
    from lragent.kernels.dispatch import resolve
    from lragent.runtime.config import EngineConfig
    from lragent.runtime.engine import Engine
    from lragent.runtime.evidence import Evidence

    require_sharing(sharing)
    place = device_named(device)
    backend = resolve_backend(backend, place)
    artifact = open_artifact(user_path(path))
    manifest = artifact.manifest
    choice = choice_of_artifact(artifact, sharing, agents, max_kl)
    config = EngineConfig(
        choice.scheme, kv_memory, max_batch_tokens, device=place, agents=agents, threads=threads, spare=spare
    )
    layout = config.scheme.layout
    if layout not in manifest.layouts:
        raise SplitRefused(
            f"{path} has no {layout} program, which {choice.scheme} needs: {manifest.refusal}",
            "Use sharing non_shared or full_shared.",
            manifest.refused,
        )
    for note in choice.notes:
        log.warning("%s", note)
    cache_dtype = dtype_named(manifest.dtype if kv_dtype == "auto" else kv_dtype)
    chosen = resolve(attention, device)
    return Engine(
        program_of_artifact(artifact, manifest.layouts[layout], backend, chosen, place, cache_dtype, allow_compiled),
        replace(
            config, page_size=manifest.page_size, kv_dtype=cache_dtype, stop_token_ids=tuple(manifest.stop_token_ids)
        ),
        tokenizer_of(artifact),
        evidence=Evidence(choice.reason, max_kl, partial(_shared_model_of, artifact)),
    )


def optimize(
    peft_model: Any,
    sharing: str = SHARING,
    tokenizer: Any = None,
    kv_memory: int | str = KV_MEMORY,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    backend: str = BACKEND,
    attention: str = ATTENTION,
    threads: int | None = None,
    unit: str = "model",
    spare: int = 0,
    max_kl: float = MAX_KL,
) -> Engine:
    """Makes an engine from a live PEFT model, on the CPU. The model is not changed; the engine shares its weights.

    Args:
        peft_model: a PEFT model with LoRA adapters, or a plain causal LM.
        sharing, kv_memory, max_batch_tokens, attention, threads, max_kl: see `load`. "auto" has no measured drift here.
        tokenizer: a transformers tokenizer, or a directory with tokenizer files; None: token ids only.
        backend: "compiled", "eager", or "auto", which means "compiled" (see `load`).
        unit: "model" or "layer", see `convert`.
        spare: number of spare agent slots, for new versions of adapters (`Engine.update_adapters`).

    Raises:
        ModelError, AdapterError: the model or an adapter can't be used.
        SplitRefused: the scheme needs the split layout, which the model does not allow, or an adapter can't be routed.
        CompilerMissing, NoSpace: compilation is not possible.
        RequestError: an argument is not valid.
    """
    from lragent.artifact.build import BuildOptions, write
    from lragent.artifact.open import resolve_backend
    from lragent.artifact.sharing_choice import acting_agents, choose, require_sharing, sizes_of_schemas
    from lragent.artifact.tokenizer import artifact_tokenizer, tokenizer_from
    from lragent.compile.compile import require_unit
    from lragent.compile.export import CPU
    from lragent.compile.live_program import program_of_model
    from lragent.kernels.dispatch import resolve
    from lragent.loading.agent_slots import agent_slots_of, fit
    from lragent.loading.model import load_live
    from lragent.passes.pipeline import rewrite
    from lragent.runtime.config import EngineConfig
    from lragent.runtime.engine import Engine
    from lragent.runtime.evidence import Evidence
    from lragent.runtime.schemes import scheme_named
    from lragent.training.open_model import shared_model_of_rewritten

    require_sharing(sharing)
    backend = resolve_backend(backend, CPU)
    require_unit(unit)
    chosen = resolve(attention, "cpu")
    reader = tokenizer_from(tokenizer)
    loaded = load_live(peft_model, None if reader is None else reader.source)
    text = artifact_tokenizer(loaded)
    if spare > 0:
        loaded = fit(loaded, agent_slots_of(loaded, spare))
    rewritten = rewrite(loaded, () if sharing == AUTO else (scheme_named(sharing).layout,), Stages())
    schemas = {str(name): program.schema for name, program in rewritten.programs.items()}
    acting = acting_agents(loaded.agents, None)
    choice = choose(sharing, acting, sizes_of_schemas(schemas, acting, loaded.dtype), {}, max_kl, "")
    for note in choice.notes:
        log.warning("%s", note)
    config = EngineConfig(choice.scheme, kv_memory, max_batch_tokens, device=CPU, threads=threads, spare=spare)
    layout = config.scheme.layout

    def save(out: Path) -> None:
        compiled = (layout,) if backend == "compiled" else ()
        options = BuildOptions(compiled=compiled, attention=chosen, unit=unit)
        write(loaded, rewritten, text, user_path(out), options=options, stages=Stages())

    return Engine(
        program_of_model(loaded, rewritten.programs[layout], backend, chosen, loaded.dtype, unit),
        replace(config, kv_dtype=loaded.dtype, stop_token_ids=text.stop_token_ids),
        reader,
        save,
        Evidence(choice.reason, max_kl, partial(shared_model_of_rewritten, loaded, rewritten)),
    )


def rollout(
    engine: Engine,
    workflow: Workflow | str,
    tasks: str | Path,
    out: str | Path,
    existing: Existing = "refuse",
    concurrency: int = 32,
    on_result: Callable[[RolloutResult], None] | None = None,
    seed: int = 0,
    rescore: bool = True,
) -> RolloutSummary:
    """Runs a workflow over a file of tasks and writes a result line as soon as a task finishes (docs/results.md).

    Args:
        workflow: `async def workflow(task, t) -> dict`, or "FILE.py:FUNC".
        tasks: JSON lines file with one object per task. A task is named by "id" or, without it, by its line number.
        out: JSON lines file with one object per finished task. The facts of the run are written beside it, into
            `OUT.run.json`.
        existing: treatment of an existing file at `out`: "refuse" raises; "resume" keeps its results and runs the other
            tasks; "retry" also runs tasks again whose result is an error, and accepts another workflow; "overwrite"
            deletes them.
        concurrency: largest number of concurrent tasks.
        on_result: called with every result after its line is written.
        seed: the run's seed; turns that give no seed derive theirs from it, the task and the place of the turn.
        rescore: if nothing is known of the adapters under the engine's sharing scheme (`Engine.evidence`), rescore a
            sample of the trajectories under `non_shared` on a thread beside the run, and report the drift.

    Raises:
        TaskFileError: a file or the workflow can't be read or written; `out` exists and `existing` is "refuse"; or the
            results in it are of another run or of tasks that have changed since.
        RequestError: an argument is not valid.
    """
    from lragent.rollouts.run import run_rollout

    return run_rollout(
        engine, workflow, user_path(tasks), user_path(out), existing, concurrency, on_result, seed, rescore
    )


def tune(
    model_dir: str | Path,
    adapters: Mapping[str, str | Path],
    trajectories: str | Path | Sequence[str | Path],
    out: str | Path,
    sharing: str = TUNED_SHARING,
    options: TuneOptions | None = None,
    existing: TuneExisting = "refuse",
    rounds: int = 1,
    workflow: str | None = None,
    tasks: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    on_step: Callable[[TuneStep], None] | None = None,
) -> TuneReport:
    """Tunes adapters so that agents keep their own `non_shared` behaviour under a sharing scheme (docs/tuning.md).

    Args:
        model_dir, adapters: see `convert`.
        trajectories: result files that `rollout` wrote under `non_shared`, or gold files (docs/results.md).
        out: folder that receives one PEFT adapter directory an agent, and the report.
        sharing: the scheme that the agents will run under.
        options: see `lragent.tuning.options.TuneOptions`; None: the defaults.
        existing: treatment of a folder of an earlier run: "refuse" raises; "resume" takes the steps that are left, the
            same as without the interruption; "overwrite" starts anew.
        rounds: more than one: each round after the first learns from trajectories that the tuned agents roll out under
            `sharing`.
        workflow: "FILE.py:FUNC", and tasks: JSON lines file; for rounds after the first.
        threads: CPU threads of torch, for the whole process; None: unchanged.
        progress: called with the name of each stage when it begins.
        on_step: called before the first step and after each.

    Raises:
        ModelError, AdapterError: the model or an adapter can't be used.
        SplitRefused: an adapter can't be routed, or K and V can't be split.
        TaskFileError: a trajectory file can't be read, or is not of this model and these adapters.
        TuneError: the folder can't be used, memory is too little, or the loss is NaN.
        RequestError: an argument is not valid.
    """
    import torch

    from lragent.runtime.threads import require_threads
    from lragent.tuning.options import TuneOptions
    from lragent.tuning.tune import TuneRequest
    from lragent.tuning.tune import tune as tune_adapters

    require_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)
    files = (trajectories,) if isinstance(trajectories, str | Path) else tuple(trajectories)

    def roll_out(tuned: Mapping[str, Path], dtype: str, artifact: Path, results: Path) -> None:
        assert workflow is not None and tasks is not None
        if not artifact.exists():
            convert(model_dir, tuned, artifact, dtype=dtype, compiled=False)
        engine = load(artifact, sharing=sharing, backend="eager", threads=threads)
        rollout(engine, workflow, tasks, results, existing="resume")

    request = TuneRequest(
        model_dir=model_dir,
        adapters=dict(adapters),
        trajectories=tuple(user_path(file) for file in files),
        out=user_path(out),
        sharing=sharing,
        options=options or TuneOptions(),
        existing=existing,
        rounds=rounds,
        roll_out=None if workflow is None or tasks is None else roll_out,
    )
    return tune_adapters(request, progress, on_step)


def verify(
    path: str | Path,
    model_dir: str | Path,
    adapters: Mapping[str, str | Path],
    prompts: Sequence[str | Sequence[int]] | None = None,
    schemes: Sequence[str] = ("non_shared", "base_lr_shared"),
    new_tokens: int = 32,
    tolerance: float | None = None,
    engine_for: Callable[[str], Engine] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Checks the hashes of an artifact's files, and compares greedy turns of its agents with PEFT in float32.

    Args:
        path: the artifact.
        model_dir, adapters: model directory and adapter directories that the artifact was converted from, or their hub
            ids. An id without a revision is the commit that the artifact was converted from.
        prompts: texts or token ids that the turns continue; None: three short texts, or random token ids if the
            artifact has no tokenizer.
        schemes: sharing schemes to check.
        new_tokens: tokens generated per prompt.
        tolerance: largest accepted difference of log-probabilities. None: 0.001 or, for a 16-bit artifact, twice the
            error of PEFT in that dtype if it is larger.
        engine_for: opens the artifact with a sharing scheme; None: `load` with its defaults.
        progress: called with the name of each stage when it begins.

    Raises:
        AdapterError: the adapters differ from those of the artifact.
        ArtifactError: the artifact is missing or damaged.
        RequestError: an argument is not valid.
    """
    from lragent.reports import verification

    return verification.verify(
        user_path(path),
        model_dir,
        adapters,
        engine_for or partial(load, path),
        prompts=prompts,
        schemes=schemes,
        new_tokens=new_tokens,
        tolerance=tolerance,
        progress=progress,
    )


def drift(
    path: str | Path,
    trajectories: str | Path,
    schemes: Sequence[str] | None = None,
    max_kl: float = MAX_KL,
    most: int | None = 32,
    progress: Progress | None = None,
) -> DriftReport:
    """Measures what sharing changes: the KL of each scheme against `non_shared` on the tokens of given trajectories.

    The drift is kept in the artifact, where `load(sharing="auto")` finds it, if the artifact can be written. `update`
    removes it. docs/quality.md says how to read it.

    Args:
        path: the artifact.
        trajectories: a file that `rollout` wrote, best under `non_shared`.
        schemes: sharing schemes to measure; None: all but `non_shared`.
        max_kl: largest drift that counts as no loss, in nats per token of the agent that drifts most.
        most: largest number of trajectories to run, spread over the file; None: all.
        progress: called with the name of each stage when it begins.

    Raises:
        TaskFileError: the trajectories can't be read, or are of other agents or another tokenizer, or are longer than
            the model's positions.
        SplitRefused: the model can't be split.
        ArtifactError: the artifact is missing or damaged.
        RequestError: an argument is not valid.
    """
    from lragent.artifact.directory import open_artifact
    from lragent.artifact.kept_drift import digests
    from lragent.reports.drift_report import drift_report
    from lragent.rollouts.turn_sequences import read_turn_sequences
    from lragent.training.drift import SHARED

    artifact = open_artifact(user_path(path))
    manifest = artifact.manifest
    file, agents = user_path(trajectories), digests(manifest)
    read = read_turn_sequences(file, agents, manifest.vocab_size, manifest.max_positions).spread(most)
    chosen = SHARED if schemes is None else tuple(schemes)
    return drift_report(artifact, read.sequences, max_kl, chosen, read.notes, progress)


def inspect(path: str | Path, adapters: Mapping[str, str | Path] | None = None) -> Inspection:
    """Describes an artifact, or the artifact that `convert` would make of a model directory (a dry run).

    Args:
        path: an artifact or, if `adapters` is given, a model directory, GGUF file or hub id.
        adapters: agent name -> PEFT adapter directory or hub id; None: `path` is an artifact.

    Raises:
        ArtifactError: the artifact is missing, damaged or of another version.
        ModelError, AdapterError: the model or an adapter can't be used.
    """
    from lragent.reports.inspection import inspect_artifact, inspect_model

    return inspect_artifact(user_path(path)) if adapters is None else inspect_model(path, adapters)


def _shared_model_of(artifact: Artifact) -> SharedModel:
    from lragent.training.open_model import shared_model_of_artifact

    return shared_model_of_artifact(artifact)
