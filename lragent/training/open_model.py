"""The forward over rows of an artifact."""

from __future__ import annotations

from lragent.artifact.directory import Artifact
from lragent.compile.export import load_with_weights
from lragent.errors import SplitRefused
from lragent.training.shared_model import SharedModel


def shared_model_of_artifact(artifact: Artifact) -> SharedModel:
    """A `SharedModel` without parameters, from the artifact's split program.

    Raises:
        SplitRefused: the artifact has no split program.
        ArtifactError: a file is missing or damaged.
    """
    manifest = artifact.manifest
    entry = manifest.layouts.get("split")
    if entry is None:
        raise SplitRefused(
            f"{artifact.directory} has no split program, which a forward under other schemes needs: {manifest.refusal}",
            "Use sharing non_shared.",
            manifest.refused,
        )
    graph = load_with_weights(artifact.file(entry.program), artifact.weights())
    return SharedModel(graph, entry.schema)
