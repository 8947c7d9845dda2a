"""Writes an adapter directory in one step."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lragent.errors import TuneError
from lragent.files.replace_directory import put_in_place
from lragent.files.tensor_file import write_tensors
from lragent.loading.adapter_config import CONFIG
from lragent.loading.adapter_files import WEIGHTS
from lragent.loading.hub import ADAPTER_FILES

UNFINISHED = ".unfinished-"  # in the name of a directory that a killed run was writing


def write_adapter(
    like: Path,
    tensors: Mapping[str, Tensor],
    out: Path,
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter with the config and tokenizer files of another one; a former `out` is replaced.

    Args:
        like: the other adapter's directory.
        config: in place of its config.

    Raises:
        TuneError: it can't be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}{UNFINISHED}", dir=out.parent))
        try:
            for pattern in ADAPTER_FILES.known:
                for file in like.glob(pattern):
                    target = scratch / file.relative_to(like)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)
            if config is not None:
                (scratch / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
            plain = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}  # none shares memory
            write_tensors(plain, scratch / WEIGHTS, metadata)
            scratch.chmod(0o755)
            put_in_place(scratch, out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise TuneError(f"{out} can't be written: {reason}", "Make room, then go on with --resume.") from error
