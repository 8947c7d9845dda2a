"""`drift.json` of an artifact: the drift of sharing schemes, as it was measured for the artifact's adapters.

The file names the adapters by their digests. It counts only for these, and an update of the adapters removes it. A seal
finds later changes, as in the manifest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lragent.artifact.directory import Artifact, cannot_write
from lragent.artifact.manifest import SEAL, Manifest, seal_of
from lragent.errors import ArtifactError
from lragent.files.locks import directory_lock
from lragent.files.replace_file import replacing
from lragent.program.drift import SchemeDrift, Tally

DRIFT = "drift.json"
FORMAT = 1
_GROUPS = ("by_agent", "by_distance", "by_context")


def digests(manifest: Manifest) -> dict[str, str]:
    """Agent -> digest of its adapter, of all agents but spare slots."""
    return {agent.name: agent.digest for agent in manifest.agents if not agent.spare}


def read_kept_drift(artifact: Artifact) -> dict[str, SchemeDrift]:
    """Scheme -> drift measured for the artifact's adapters; empty if there is none, or only of other adapters.

    Raises:
        ArtifactError: the file is damaged, changed or of another version.
    """
    file = artifact.directory / DRIFT
    hint = f"Delete the file, and measure again: `lragent verify {artifact.directory} --trajectories RESULTS.jsonl`."
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ArtifactError(f"{file} has format {raw['format']!r}, this lragent reads {FORMAT}", hint)
        if raw.pop(SEAL) != seal_of(raw):
            raise ArtifactError(f"{file} was changed after it was written", hint)
        found = [_scheme(entry) for entry in raw["schemes"]]
        agents = raw["agents"]
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ArtifactError(f"{file} is damaged: {type(error).__name__}: {error}", hint) from error
    return {drift.scheme: drift for drift in found} if agents == digests(artifact.manifest) else {}


def keep_drift(artifact: Artifact, found: Iterable[SchemeDrift]) -> None:
    """Writes the drift of schemes into an artifact. Schemes that were measured before stay.

    Raises:
        ArtifactError: the file is damaged or can't be written.
    """
    try:
        with directory_lock(artifact.directory):
            schemes = {**read_kept_drift(artifact), **{drift.scheme: drift for drift in found}}
            raw = {
                "format": FORMAT,
                "agents": digests(artifact.manifest),
                "schemes": [dataclasses.asdict(drift) for drift in schemes.values()],
            }
            with replacing(artifact.directory / DRIFT) as file:
                file.write(json.dumps({**raw, SEAL: seal_of(raw)}, indent=1).encode())
    except OSError as error:
        raise cannot_write(artifact.directory / DRIFT, error) from error


def remove_kept_drift(directory: Path) -> None:
    """Removes the file, if there is one. The caller holds the artifact's lock."""
    (directory / DRIFT).unlink(missing_ok=True)


def _scheme(raw: Mapping[str, Any]) -> SchemeDrift:
    groups = {name: {key: Tally(**tally) for key, tally in raw[name].items()} for name in _GROUPS}
    return SchemeDrift(raw["scheme"], Tally(**raw["total"]), **groups)
