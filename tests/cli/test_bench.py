from pathlib import Path

from tests.cli.conftest import EAGER, call

SMALL = ("--trajectories", 2, "--turns", 4, "--prompt-tokens", 20, "--new-tokens", 3, "--observation-tokens", 5)


def test_every_scheme_does_the_same_work_and_none_shares_more_than_it_says(eager_artifact: Path) -> None:
    outcome = call("bench", eager_artifact, *SMALL, *EAGER, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json()
    runs = {run["sharing"]: run for run in found["runs"]}
    assert found["backend"] == "eager" and len(runs) == 6
    assert {run["generated"] for run in runs.values()} == {2 * 4 * 3}
    assert all(run["failed"] == 0 and run["exact_match"] is None for run in runs.values())
    assert runs["non_shared"]["prefill"] > runs["base_lr_shared"]["prefill"] == runs["full_shared"]["prefill"]
    assert runs["neutral_shared"]["prefill"] == runs["base_lr_shared"]["prefill"]
    assert {name for name, run in runs.items() if run["catch_up"]} == {"base_shared"}
    assert {name for name, run in runs.items() if run["adapter_free"]} == {"rebase_shared"}
    assert {name: run["acting"] for name, run in runs.items() if run["acting"]} == {"neutral_shared": 2 * 4 * 3}
    assert runs["full_shared"]["peak_cache_bytes"] < runs["base_lr_shared"]["peak_cache_bytes"]
    assert runs["base_lr_shared"]["peak_cache_bytes"] < runs["non_shared"]["peak_cache_bytes"]
    assert all(0 < run["switch_ttft"] < 10 * run["seconds"] for run in runs.values())


def test_the_table_has_a_column_a_scheme(eager_artifact: Path) -> None:
    outcome = call("bench", eager_artifact, *SMALL, *EAGER, "--schemes", "non_shared,base_lr_shared")
    assert outcome.code == 0, outcome.err
    for text in ("non_shared", "base_lr_shared", "computed: catch-up", "cache at peak", "wall time"):
        assert text in outcome.out
    assert "exact match" not in outcome.out and "tasks failed" not in outcome.out


def test_trajectories_that_fail_are_no_success(eager_artifact: Path) -> None:
    outcome = call("bench", eager_artifact, *SMALL, *EAGER, "--schemes", "non_shared", "--prompt-tokens", 100_000)
    assert outcome.code == 1
    assert "2 of 2 trajectories failed" in outcome.err and "tasks failed" in outcome.out
