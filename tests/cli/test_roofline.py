from pathlib import Path

from tests.cli.conftest import call
from tests.models import WrittenModel


def test_an_artifact_says_that_it_is_an_estimate(eager_artifact: Path) -> None:
    outcome = call("roofline", eager_artifact, "--gpu", "h100", "--context", 8192, "--decoding", 3)
    assert outcome.code == 0, outcome.err
    for text in ("estimated decode step", "An estimate, not a measurement", "base_lr_shared", "8192 tokens", " ms"):
        assert text in outcome.out


def test_a_model_directory(tiny_llama: WrittenModel) -> None:
    outcome = call("roofline", tiny_llama.model_dir, "--agents", 5, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json()
    times = {row["sharing"]: row["seconds_once"] for row in found["estimates"]}
    assert found["agents"] == 5 and len(times) == 6 and "estimate" in found["note"]
    assert times["full_shared"] <= times["base_lr_shared"]
