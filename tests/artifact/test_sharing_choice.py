"""The scheme that "auto" chooses, and the lines that a user gets."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lragent
from lragent.artifact.directory import open_artifact
from lragent.artifact.kept_drift import keep_drift
from lragent.artifact.manifest import read_manifest, write_manifest
from lragent.artifact.sharing_choice import choose, layout_of_auto
from lragent.errors import RequestError
from lragent.program.agent import Agent
from lragent.program.drift import SchemeDrift, Tally
from tests.models import WrittenModel

SIZES = {"non_shared": (10, 20), "full_shared": (10, 10), "base_lr_shared": (12, 12), "base_shared": (11, 12)}


def agents(*tuned_for: str) -> tuple[Agent, ...]:
    return tuple(Agent(f"a{i}", digest="d", tuned_for=scheme) for i, scheme in enumerate(tuned_for))


def measured(**kl: float) -> dict[str, SchemeDrift]:
    tallies = {scheme: Tally(10, 10 * value, 10) for scheme, value in kl.items()}
    return {name: SchemeDrift(name, tally, {"a0": tally, "a1": tally}, {}, {}) for name, tally in tallies.items()}


@pytest.mark.parametrize(
    ("tuned", "kept", "scheme", "reason"),
    [
        (("", ""), {}, "non_shared", "exact"),
        (("base_lr_shared", "base_lr_shared"), {}, "base_lr_shared", "tuned"),
        (("base_lr_shared", ""), {}, "non_shared", "exact"),
        (("base_lr_shared", "full_shared"), {}, "non_shared", "exact"),
        (("rebase_shared", "rebase_shared"), {}, "non_shared", "exact"),  # the artifact can't run it
        (("", ""), measured(full_shared=0.2, base_lr_shared=0.01, base_shared=0.0), "base_lr_shared", "measured"),
        (("", ""), measured(full_shared=0.05, base_lr_shared=0.01), "full_shared", "measured"),
        (("", ""), measured(full_shared=0.2, base_lr_shared=0.1), "non_shared", "exact"),
        (("base_lr_shared", "base_lr_shared"), measured(full_shared=0.0), "base_lr_shared", "tuned"),
        (("non_shared", "non_shared"), measured(full_shared=0.0), "non_shared", "exact"),
    ],
)
def test_auto(tuned: tuple[str, ...], kept: Mapping[str, SchemeDrift], scheme: str, reason: str) -> None:
    choice = choose("auto", agents(*tuned), SIZES, kept, 0.05, "m.lragent")
    assert (choice.scheme, choice.reason) == (scheme, reason)


@pytest.mark.parametrize(
    ("tuned", "kept", "asked", "reason"),
    [
        (("", ""), {}, "non_shared", "exact"),
        (("", ""), {}, "full_shared", "none"),
        (("", ""), measured(full_shared=0.01), "full_shared", "measured"),
        (("", ""), measured(full_shared=0.2), "full_shared", "none"),
        (("full_shared", "full_shared"), {}, "full_shared", "tuned"),
        (("base_lr_shared", "base_lr_shared"), {}, "full_shared", "none"),
    ],
)
def test_a_scheme_that_is_asked_for_is_taken(
    tuned: tuple[str, ...], kept: Mapping[str, SchemeDrift], asked: str, reason: str
) -> None:
    choice = choose(asked, agents(*tuned), SIZES, kept, 0.05, "m.lragent")
    assert (choice.scheme, choice.reason) == (asked, reason)


def notes(asked: str, tuned: tuple[str, ...], kept: Mapping[str, SchemeDrift], sizes: Any = SIZES) -> list[str]:
    return list(choose(asked, agents(*tuned), sizes, kept, 0.05, "m.lragent").notes)


def test_one_line_says_what_sharing_would_save_and_how_to_get_it() -> None:
    (line,) = notes("auto", ("", ""), {})
    for text in ("base_lr_shared", "12 bytes", "instead of 20", "lragent verify m.lragent", "lragent tune"):
        assert text in line
    assert "\n" not in line
    (line,) = notes("auto", ("", ""), measured(base_lr_shared=0.1))
    assert "0.1 nats a token (a0)" in line and "lragent tune" in line and "verify" not in line


def test_nothing_is_said_where_sharing_saves_nothing() -> None:
    assert notes("auto", ("", ""), {}, {**SIZES, "base_lr_shared": (20, 20)}) == []
    assert notes("auto", ("", ""), {}, {"non_shared": (10, 20), "full_shared": (10, 10)}) == []
    assert notes("auto", ("base_lr_shared", "base_lr_shared"), {}) == []
    assert notes("base_lr_shared", ("", ""), {}) == notes("non_shared", ("", ""), {}) == []


def test_adapters_under_another_scheme_than_their_own_get_a_warning() -> None:
    (line,) = notes("non_shared", ("base_lr_shared", ""), {})
    assert "another sharing scheme than non_shared" in line and "a0 for base_lr_shared" in line
    assert notes("base_lr_shared", ("base_lr_shared", ""), {}) == []
    (line,) = notes("full_shared", ("", ""), measured(full_shared=0.2))
    assert "0.2 nats a token (a0), above 0.05" in line


def test_a_limit_that_means_nothing_is_refused(eager_artifact: Path) -> None:
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(RequestError, match="max_kl is"):
            lragent.load(eager_artifact, max_kl=wrong)


def test_the_layout_that_convert_compiles() -> None:
    assert layout_of_auto(agents("", "")) == "dense"
    assert layout_of_auto((*agents("base_lr_shared", "base_lr_shared"), Agent("~1"))) == "split"
    assert layout_of_auto(agents("of a later version", "of a later version")) == "dense"


def test_load_takes_what_is_known(eager_artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(shutil.copytree(eager_artifact, tmp_path / "m.lragent"))

    def opened(**options: Any) -> tuple[str, str]:
        caplog.clear()
        engine = lragent.load(path, backend="eager", kv_memory="1MiB", **options)
        return engine.sharing, engine.evidence.reason

    assert opened() == ("non_shared", "exact")
    assert "sharing is non_shared" in caplog.text
    tally = Tally(10, 0.2, 9)
    by_agent = {"plan": tally, "action": Tally(10, 0.8, 9)}
    keep_drift(open_artifact(path), [SchemeDrift("base_lr_shared", tally, by_agent, {}, {})])
    assert opened() == ("non_shared", "exact")  # of reflect nothing is known
    assert opened(agents=["plan", "action"], max_kl=0.1) == ("base_lr_shared", "measured")
    assert opened(agents=["plan", "action"], max_kl=0.05) == ("non_shared", "exact")
    assert opened(sharing="base_lr_shared") == ("base_lr_shared", "none")
    manifest = read_manifest(path)
    tuned = tuple(replace(agent, tuned_for="base_shared") for agent in manifest.agents)
    write_manifest(replace(manifest, agents=tuned), path)
    assert opened() == ("base_shared", "tuned") and caplog.text == ""
    assert opened(sharing="full_shared") == ("full_shared", "none")
    assert "tuned for another sharing scheme than full_shared" in caplog.text


def test_optimize_is_as_careful(tiny_llama: WrittenModel, caplog: pytest.LogCaptureFixture) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama.model_dir)
    model = PeftModel.from_pretrained(base, tiny_llama.adapters["plan"], adapter_name="plan")
    model.load_adapter(tiny_llama.adapters["action"], adapter_name="action")
    engine = lragent.optimize(model, backend="eager", kv_memory="1MiB")
    assert (engine.sharing, engine.evidence.reason) == ("non_shared", "exact")
    assert "lragent verify ARTIFACT" in caplog.text
    shared = lragent.optimize(model, "base_lr_shared", backend="eager", kv_memory="1MiB")
    assert (shared.sharing, shared.evidence.reason) == ("base_lr_shared", "none")
