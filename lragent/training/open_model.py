"""The forward over rows of an artifact, and of a model whose programs are in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lragent.artifact.directory import Artifact
from lragent.errors import SplitRefused
from lragent.graph.graph_file import read_graph
from lragent.training.shared_model import SharedModel

if TYPE_CHECKING:
    from lragent.errors import Miss
    from lragent.loading.model import LoadedModel
    from lragent.passes.pipeline import Rewritten


def shared_model_of_artifact(artifact: Artifact) -> SharedModel:
    """A `SharedModel` without parameters, from the artifact's split program.

    Raises:
        SplitRefused: the artifact has no split program.
        ArtifactError: a file is missing or damaged.
    """
    manifest = artifact.manifest
    entry = manifest.layouts.get("split")
    if entry is None:
        raise _refused(str(artifact.directory), manifest.refusal, manifest.refused)
    graph = read_graph(artifact.file(entry.program), artifact.weights())
    return SharedModel(graph, entry.schema)


def shared_model_of_rewritten(loaded: LoadedModel, rewritten: Rewritten) -> SharedModel:
    """A `SharedModel` from a loaded model's split program, which stays as it is: nothing is captured again.

    Raises:
        SplitRefused: it has none.
    """
    from lragent.passes.pipeline import copied

    split = rewritten.programs.get("split")
    if split is None:
        raise _refused(loaded.architecture, rewritten.refusal, rewritten.refused)
    return SharedModel.of_program(loaded, replace(split, graph=copied(split.graph)))


def _refused(subject: str, refusal: str, places: tuple[Miss, ...]) -> SplitRefused:
    return SplitRefused(
        f"{subject} has no split program, which a forward under other schemes needs: {refusal}",
        "Use sharing non_shared.",
        places,
    )
