"""Reads a base model from disk: a directory with one or several safetensors files, or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lragent.errors import ModelError, shortened
from lragent.loading.adapter_weights import is_finite
from lragent.program.dtypes import dtype_name

GGUF = ".gguf"


@dataclass(frozen=True)
class Checkpoint:
    """Location of a model.

    Args:
        directory: the model directory.
        gguf: name of the GGUF file in it; None: config.json and safetensors.
    """

    directory: Path
    gguf: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `from_pretrained` besides the directory."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}

    @property
    def path(self) -> Path:
        """The model directory or GGUF file."""
        return self.directory if self.gguf is None else self.directory / self.gguf


def find_checkpoint(path: Path) -> Checkpoint:
    """Locates the model at `path`: a GGUF file, a directory with config.json, or one with exactly one GGUF file.

    Raises:
        ModelError: the path doesn't exist, or has neither a config.json nor exactly one GGUF file.
    """
    if path.is_file() and path.suffix == GGUF:
        return Checkpoint(path.parent, path.name)
    if not path.is_dir():
        raise ModelError(
            f"no model directory at {path}", "Give a folder with config.json and safetensors files, or a GGUF file."
        )
    if (path / "config.json").is_file():
        return Checkpoint(path)
    found = sorted(file.name for file in path.glob(f"*{GGUF}"))
    if len(found) > 1:
        raise ModelError(f"{path} holds {len(found)} GGUF files ({', '.join(found)})", "Give one of them as the model.")
    if not found:
        raise ModelError(f"{path} has no config.json", "Give a folder saved with save_pretrained, or a GGUF file.")
    return Checkpoint(path, found[0])


def read_config(checkpoint: Checkpoint) -> Any:
    """Reads a model's config. Python code that comes with the model is never run.

    Returns:
        A transformers config.

    Raises:
        ModelError: the config can't be read, or needs code from the model's folder.
    """
    from transformers import AutoConfig

    with loading_errors(checkpoint.path):
        return AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, **checkpoint.arguments)


def read_usable_config(checkpoint: Checkpoint) -> Any:
    """Reads the config of a model that is to be loaded.

    Raises:
        ModelError: see `read_config`; the model is quantised (other than GGUF).
    """
    config = read_config(checkpoint)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{checkpoint.path} is quantised",
            "Convert from the unquantised checkpoint, which its adapters fit as well.",
        )
    return config


def read_base(path: Path, dtype: torch.dtype) -> Any:
    """Loads the causal LM at `path` in one dtype. GGUF weights are dequantised.

    An attention implementation that the config asks for is not used; the program has its own.

    Returns:
        A transformers model.

    Raises:
        ModelError: the model can't be read, needs code from its folder, lacks weights, has weights of another shape
            than its config or with infinite values or NaN, or is quantised (other than GGUF).
    """
    from transformers import AutoModelForCausalLM

    checkpoint = find_checkpoint(path)
    config = read_usable_config(checkpoint)
    with loading_errors(path), _without_reports():
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype,
            attn_implementation=None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            trust_remote_code=False,
            **checkpoint.arguments,
        )
    if info["missing_keys"]:
        some = sorted(info["missing_keys"])
        raise ModelError(f"{path} lacks {len(some)} weights, {some[0]} for one", "Use a complete checkpoint.")
    if info["mismatched_keys"]:
        key, found, wanted = min(info["mismatched_keys"])
        raise ModelError(
            f"{path}: weight {key} has shape {list(found)}, config.json wants {list(wanted)}", "Check the checkpoint."
        )
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            raise ModelError(
                f"{path}: weight {name} holds infinite values or NaN as {dtype_name(dtype)}",
                "Copy the checkpoint again, or choose another dtype if this one is float16.",
            )
    return model


@contextmanager
def loading_errors(path: Path) -> Iterator[None]:
    """Converts errors that transformers raises while it loads a model into ModelError."""
    try:
        yield
    except Exception as error:  # a broken file can raise anything
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{path} needs Python code that comes with the model (auto_map in config.json), which is never run",
                "Use a model type that transformers has itself; docs/coverage.md lists those that convert.",
            ) from error
        raise ModelError(
            f"transformers can't load a causal LM from {path}: {type(error).__name__}: {shortened(error)}",
            "Check its config.json, and that all weight files are present and complete.",
        ) from error


@contextmanager
def _without_reports() -> Iterator[None]:
    """Silences transformers' tables of missing and unexpected weights; those that matter raise errors here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# Positions of a model whose config sets no limit.
UNLIMITED_POSITIONS = 1 << 15


def max_positions(config: Any) -> int:
    """Number of positions of a model, from its config."""
    for attribute in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, attribute, None)
        if isinstance(value, int) and value > 0:
            return value
    return UNLIMITED_POSITIONS


def stop_tokens(model: Any) -> tuple[int, ...]:
    """Default stop token ids: `eos_token_id` of the generation config or, if that has none, of the config.

    Raises:
        ModelError: `eos_token_id` is not an integer or a list of integers.
    """
    for holder in (getattr(model, "generation_config", None), model.config):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            stops = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if not all(isinstance(stop, int) for stop in stops):
                raise ModelError(f"the model's eos_token_id is {value!r}", "Correct its generation_config.json.")
            return stops
    return ()
