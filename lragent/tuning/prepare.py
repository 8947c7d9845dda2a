"""Loads model and adapters for a tuning run and builds the forward that is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lragent.loading.model import LoadedModel, load_directories
from lragent.loading.stages import Stages
from lragent.training.shared_model import SharedModel
from lragent.tuning.added_modules import modules_to_add, with_added_modules
from lragent.tuning.digests import digests_by_agent
from lragent.tuning.options import TuneOptions
from lragent.tuning.save_adapters import Parent, read_parent
from lragent.tuning.source_runs import SourceRun, require_same_vocabulary, run_dtype
from lragent.tuning.trained import frozen_modules, trained_parameters


@dataclass(frozen=True)
class Prepared:
    """A model ready for tuning.

    Args:
        parameters: those that are trained, by name.
        parents: the adapters that tuning begins with, added modules included.
        digest_of: agent -> digest of the adapter given; digests: in every dtype that a run may have had.
        notes: sentences for the user.
    """

    loaded: LoadedModel
    model: SharedModel
    parameters: Mapping[str, nn.Parameter]
    parents: Mapping[str, Parent]
    digest_of: Mapping[str, str]
    digests: Mapping[str, frozenset[str]]
    notes: tuple[str, ...]


def prepare(
    model_dir: str | Path,
    adapters: Mapping[str, str | Path],
    runs: Sequence[SourceRun],
    options: TuneOptions,
    extended: Path,
    stages: Stages,
) -> Prepared:
    """Loads and captures the model.

    Args:
        extended: folder for adapters with added modules.

    Raises:
        ModelError, AdapterError: see `lragent.convert`.
        SplitRefused: an adapter can't be routed, or K and V can't be split.
        TaskFileError: the trajectories are of another vocabulary.
        TuneError: nothing can be trained.
    """
    dtype = run_dtype(runs, options.dtype)
    loaded = stages.run("load", lambda: load_directories(model_dir, adapters, dtype))
    require_same_vocabulary(runs, loaded.vocab_size)
    digest_of = {agent.name: agent.digest for agent in loaded.agents}
    digests = digests_by_agent(loaded)
    if options.add_modules:
        modules = modules_to_add(loaded, options.add_modules)
        folders = with_added_modules(loaded, modules, options.add_rank, options.seed, extended)
        loaded = stages.run("load the new modules", lambda: load_directories(model_dir, folders, dtype))
    if not options.tie_a:
        groups = {module: tuple(range(len(loaded.agents))) for module in loaded.lora}
        loaded = dataclasses.replace(loaded, groups=groups)
    model = SharedModel.of_model(loaded, stages)
    frozen = frozen_modules(loaded, model)
    parameters = trained_parameters(model, options.train, frozen)
    parents = {agent: read_parent(agent, folder, loaded.model) for agent, folder in loaded.adapter_folders.items()}
    notes = (*loaded.notes, *(f"{module} is not trained: {reason}" for module, reason in frozen.items()))
    return Prepared(loaded, model, parameters, parents, digest_of, digests, notes)
