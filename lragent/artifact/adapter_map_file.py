"""The map of a program's constants that follow from adapters, as a file of an artifact.

Tensors of head maps are stored once, as `N.FIELD`. All else is JSON in the file's metadata.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lragent.artifact.weights import save_tensors
from lragent.errors import ArtifactError
from lragent.files.checked_file import FileEntry
from lragent.program.adapter_map import AdapterMap, AttentionConstant, HeadMap, RoutedConstants
from lragent.program.cache_schema import LowRankStream

_MAP = "adapter_map"
_FIELDS = tuple(field.name for field in dataclasses.fields(HeadMap))


def write_map(adapter_map: AdapterMap, directory: Path, relative: str) -> FileEntry:
    """Writes a map into an artifact.

    Raises:
        OSError: it can't be written.
    """
    numbers: dict[tuple[bytes, ...], int] = {}
    tensors: dict[str, Tensor] = {}
    attention: list[dict[str, Any]] = []
    for constant in adapter_map.attention:
        heads = {name: getattr(constant.heads, name) for name in _FIELDS}
        held = {name: tensor for name, tensor in heads.items() if tensor is not None}
        content = tuple(
            f"{name} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes()
            for name, tensor in held.items()
        )
        number = numbers.setdefault(content, len(numbers))
        tensors.update({f"{number}.{name}": tensor.contiguous() for name, tensor in held.items()})
        attention.append({**_plain(constant, "heads"), "heads": number})
    routed = [{**_plain(entry, "stream"), "stream": _plain(entry.stream, "held")} for entry in adapter_map.routed]
    text = json.dumps({"routed": routed, "attention": attention, "fixed": adapter_map.fixed})
    return save_tensors(directory, relative, tensors, {_MAP: text})


def read_map(file: Path) -> AdapterMap:
    """Reads a map.

    Raises:
        ArtifactError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            raw = json.loads(opened.metadata()[_MAP])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return AdapterMap(
            routed=tuple(_routed(entry) for entry in raw["routed"]),
            attention=tuple(_attention(entry, tensors) for entry in raw["attention"]),
            fixed=tuple(raw["fixed"]),
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} is damaged: {type(error).__name__}: {error}", "Convert the model again."
        ) from error


def _plain(entry: RoutedConstants | AttentionConstant | LowRankStream, without: str) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry) if field.name != without}


def _routed(raw: dict[str, Any]) -> RoutedConstants:
    stream = raw["stream"]
    low_rank = LowRankStream(stream["module"], tuple(stream["ranks"]), tuple(stream["shares_a_with"]))
    return RoutedConstants(**{**raw, "stream": low_rank})


def _attention(raw: dict[str, Any], tensors: dict[str, Tensor]) -> AttentionConstant:
    heads = HeadMap(**{name: tensors.get(f"{raw['heads']}.{name}") for name in _FIELDS})
    return AttentionConstant(
        **{**raw, "modules": tuple(raw["modules"]), "starts": tuple(raw["starts"]), "heads": heads}
    )
