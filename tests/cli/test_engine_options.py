"""Options that several commands share are those of `lragent.load`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import get_args

import pytest

import lragent
from lragent.kernels.implementations import IMPLEMENTATIONS
from lragent.runtime.config import EngineConfig
from lragent_cli.engine_options import AttentionName, EngineOptions
from tests.cli.conftest import call

OWN = ("sharing", "kv_dtype")  # an engine has a scheme and a dtype; "auto" is decided before
COMMANDS = ("convert", "verify", "rollout", "bench")


def test_defaults_are_those_of_load() -> None:
    taken = inspect.signature(lragent.load).parameters
    for field in dataclasses.fields(EngineOptions):
        assert field.default == taken[field.name].default, field.name


@pytest.mark.parametrize("maker", [lragent.load, lragent.optimize])
def test_defaults_are_those_of_the_engine(maker: Callable[..., object]) -> None:
    taken = inspect.signature(maker).parameters
    shared = [field for field in dataclasses.fields(EngineConfig) if field.name in taken and field.name not in OWN]
    assert {"kv_memory", "max_batch_tokens", "threads"} <= {field.name for field in shared}
    for field in shared:
        assert taken[field.name].default == field.default, field.name


def test_attention_names_are_those_that_there_are() -> None:
    assert get_args(AttentionName) == ("auto", *IMPLEMENTATIONS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_attention_names_and_an_unknown_one_is_refused(command: str) -> None:
    shown = call(command, "--help").out
    refused = call(command, "x", "--attention", "magic")
    assert refused.code == 2 and "--attention" in refused.err
    for name in ("auto", *IMPLEMENTATIONS):
        assert name in shown and name in refused.err
