"""Facts of tuning in the metadata of an adapter's safetensors file. PEFT ignores them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lragent.errors import AdapterError
from lragent.loading.adapter_files import WEIGHTS

KEY = "lragent"


@dataclass(frozen=True)
class Tuned:
    """Facts of a tuned adapter.

    Args:
        sharing: the scheme that it was tuned for.
        agent: its name then.
        parents: agent -> digest of the adapter that tuning began with, of all agents tuned together.
        dtype: of the base weights; a digest depends on it.
        steps: optimizer steps, of all rounds.
        version: of lragent.
    """

    sharing: str
    agent: str
    parents: Mapping[str, str]
    dtype: str
    steps: int
    version: str


def metadata_of(tuned: Tuned) -> dict[str, str]:
    """Metadata for the file."""
    return {"format": "pt", KEY: json.dumps(asdict(tuned))}


def tuned_for(name: str, folder: Path) -> str:
    """The sharing scheme that an adapter was tuned for; "" if its file doesn't say.

    Raises:
        AdapterError: the entry in the metadata is damaged.
    """
    from safetensors import safe_open

    file = folder / WEIGHTS
    if not file.is_file():  # an older format, without metadata
        return ""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(KEY)
    if text is None:
        return ""
    try:
        return str(json.loads(text)["sharing"])
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"adapter {name}: the entry {KEY!r} in the metadata of {file} is damaged: {error}", "Copy the file again."
        ) from error
