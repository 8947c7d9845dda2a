"""Runs that can't be: each error says what was found and what to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lragent
from lragent.errors import RequestError, SplitRefused, TaskFileError, TuneError
from lragent.loading.model import load_directories
from lragent.training.schemes import rows_of
from lragent.training.shared_model import SharedModel
from lragent.training.turn_sequence import Turn, TurnSequence
from lragent.tuning import memory, train
from lragent.tuning.batches import Batch
from lragent.tuning.material import Material
from lragent.tuning.options import TuneOptions
from tests.models import write_model
from tests.models.variants import write_variants
from tests.tuning.conftest import RolledOut

FEW = TuneOptions(steps=2, batch_tokens=120, held_out=0.2)


def copied_results(given: RolledOut, folder: Path, run_file: bool = False) -> Path:
    path = folder / "results.jsonl"
    shutil.copy(given.results, path)
    if run_file:
        shutil.copy(f"{given.results}.run.json", f"{path}.run.json")
    return path


def test_trajectories_of_another_tokenizer_are_improbable(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    """The ids are in the vocabulary and the adapters are the same, but the base gives each token another id.

    Its logits are larger: those of a random model say too little for a difference far above the limit.
    """
    other = tmp_path / "model"
    shutil.copytree(rolled_out_qv.model_dir, other)
    weights = load_file(other / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name].roll(17, 0) * (4 if name == "lm_head.weight" else 1)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TaskFileError, match=r"differ from those of these adapters under non_shared by \d+\.\d nats"):
        lragent.tune(other, rolled_out_qv.adapters, rolled_out_qv.results, tmp_path / "out", options=FEW)


def test_trajectories_of_another_vocabulary_are_refused_by_their_run(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    results = copied_results(rolled_out_qv, tmp_path, run_file=True)
    run_file = Path(f"{results}.run.json")
    run = json.loads(run_file.read_text())
    run["runs"][0]["parts"]["artifact"]["vocab_size"] = 100
    run_file.write_text(json.dumps(run))
    with pytest.raises(TaskFileError, match="a vocabulary of 100 tokens, the model has 128"):
        lragent.tune(rolled_out_qv.model_dir, rolled_out_qv.adapters, results, tmp_path / "out", options=FEW)


def test_adapters_that_no_turn_is_of_are_named(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    plan = rolled_out_qv.adapters["plan"]
    swapped = {"plan": rolled_out_qv.adapters["action"], "action": plan, "reflect": plan}
    with pytest.raises(TaskFileError, match=r"no turn counts: skipped turns of other adapters .*: 10 of action, 10 of"):
        lragent.tune(rolled_out_qv.model_dir, swapped, rolled_out_qv.results, tmp_path / "out", options=FEW)


def test_a_dtype_of_the_run_is_known_without_its_run_file(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    """The digests are those of a float32 run; the run file names float32, too."""
    results = copied_results(rolled_out_qv, tmp_path)
    with pytest.raises(TaskFileError, match="in the run's dtype"):
        options = replace(FEW, dtype="bfloat16")
        lragent.tune(rolled_out_qv.model_dir, rolled_out_qv.adapters, results, tmp_path / "out", options=options)
    shutil.rmtree(tmp_path / "out")
    report = lragent.tune(rolled_out_qv.model_dir, rolled_out_qv.adapters, results, tmp_path / "out", options=FEW)
    assert report.rounds[0].steps == 2


def test_adapters_that_cannot_be_split_are_refused_as_by_convert(rolled_out: RolledOut, tmp_path: Path) -> None:
    dora = write_variants(tmp_path, "llama", {"plan": {"use_dora": True, "target_modules": ["k_proj"]}})
    gold = tmp_path / "gold.jsonl"
    gold.write_text('{"token_ids": [1, 2, 3], "generated": [["plan", null, 1, 3]]}\n')
    with pytest.raises(SplitRefused) as converting:
        lragent.convert(dora.model_dir, dora.adapters, tmp_path / "m.lragent", layouts=("split",), compiled=False)
    with pytest.raises(SplitRefused) as tuning:
        lragent.tune(dora.model_dir, dora.adapters, gold, tmp_path / "out", options=FEW)
    assert tuning.value.message == converting.value.message


@pytest.mark.parametrize(
    ("free", "batch_tokens", "remedy"),
    [(100, 1000, "Use --batch-tokens"), (40, 20, "Leave out trajectories above 40 tokens, such as")],
)
def test_too_little_memory_says_what_would_fit(
    rolled_out_qv: RolledOut,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    batch_tokens: int,
    remedy: str,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free << 20)
    monkeypatch.setattr(memory.Sizes, "step_bytes", lambda self, rows: len(rows.token_ids_N) << 20)
    with pytest.raises(
        TuneError, match=r"needs about 0\.\d GiB, 0\.\d GiB are free; about \d+ tokens would fit"
    ) as error:
        lragent.tune(
            rolled_out_qv.model_dir,
            rolled_out_qv.adapters,
            rolled_out_qv.results,
            tmp_path / "out",
            options=replace(FEW, batch_tokens=batch_tokens, steps=20),
        )
    assert remedy in error.value.hint


SIZES = memory.Sizes(layers=2, hidden=64, outputs=512, key_value=64, experts=0, pair_bytes=5, trained=100, itemsize=4)


def test_more_rows_need_more_memory() -> None:
    turns = (Turn("plan", 10, 20), Turn("action", 30, 40))
    sequences = [TurnSequence(tuple(range(first, first + 40)), turns) for first in (0, 1)]
    one, two = (SIZES.step_bytes(rows_of("base_lr_shared", sequences[:n], ("plan", "action"))) for n in (1, 2))
    assert one < two < 2 * one
    assert two < SIZES.step_bytes(rows_of("non_shared", sequences, ("plan", "action")))
    assert SIZES.teacher_bytes(1000) == 1000 * 64 * 4


def test_kept_scores_and_gathered_experts_count() -> None:
    sequences = [TurnSequence(tuple(range(40)), (Turn("plan", 30, 40),))]
    rows = rows_of("base_lr_shared", sequences, ("plan",))
    for more in (replace(SIZES, pair_bytes=4 * 8 * 4), replace(SIZES, experts=4096)):
        assert more.step_bytes(rows) > SIZES.step_bytes(rows)
        assert more.activation_bytes(rows) > SIZES.activation_bytes(rows)


@pytest.mark.parametrize(("kind", "holds_scores"), [("llama", False), ("mixtral", False), ("gpt_oss", True)])
def test_sizes_of_models(kind: str, holds_scores: bool, tmp_path: Path) -> None:
    written = write_model(tmp_path, kind, "qv", False, {"plan": 4}, layers=2)
    loaded = load_directories(written.model_dir, written.adapters, "float32")
    sizes = memory.sizes_of(loaded, SharedModel.of_model(loaded), trained=100)
    config = loaded.model.config
    an_expert = sum(weight[0].numel() for weight in loaded.model.model.layers[0].mlp.parameters() if weight.dim() == 3)
    assert (an_expert > 0) is (kind != "llama")
    assert sizes.experts == an_expert * getattr(config, "num_experts_per_tok", 0)
    assert sizes.key_value == 2 * config.num_key_value_heads * loaded.model.model.layers[0].self_attn.head_dim
    assert (sizes.pair_bytes > 5) is holds_scores


@pytest.mark.parametrize("heads", [4, [2, 4], None])
def test_sizes_of_configs_with_heads_by_layer_or_of_another_name(heads: object, tmp_path: Path) -> None:
    written = write_model(tmp_path, "gpt_oss", "qv", False, {"plan": 4}, layers=2)
    loaded = load_directories(written.model_dir, written.adapters, "float32")
    model = SharedModel.of_model(loaded)
    vars(loaded.model.config)["num_attention_heads"] = heads  # setting it checks its type
    counted = 4 if heads else max(layer.kv_heads for layer in model.schema.base)
    assert memory.sizes_of(loaded, model, trained=100).pair_bytes == memory.SCORES * counted * 4


def test_neutral_shared_keeps_activations_of_acting_rows_alone() -> None:
    sequences = [TurnSequence(tuple(range(40)), (Turn("plan", 30, 40),))]
    neutral, shared = (
        SIZES.activation_bytes(rows_of(scheme, sequences, ("plan",))) for scheme in ("neutral_shared", "base_lr_shared")
    )
    assert 0.25 < neutral / shared < 0.4


@pytest.mark.parametrize(("free", "recomputed"), [(1 << 40, False), (100 << 20, True)])
def test_layers_are_recomputed_where_activations_do_not_fit(
    rolled_out_qv: RolledOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, recomputed: bool
) -> None:
    seen: list[bool] = []
    step = train.loss_of

    def watched(material: Material, batch: Batch) -> train.StepLoss:
        seen.append(material.model.checkpointing)
        return step(material, batch)

    monkeypatch.setattr(train, "loss_of", watched)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory.Sizes, "step_bytes", lambda self, rows: 60 << 20)
    lragent.tune(rolled_out_qv.model_dir, rolled_out_qv.adapters, rolled_out_qv.results, tmp_path / "out", options=FEW)
    assert seen
    assert set(seen) == {recomputed}


def test_too_little_memory_for_the_teacher_says_what_to_leave_out(
    rolled_out_qv: RolledOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 << 30)
    monkeypatch.setattr(memory.Sizes, "teacher_bytes", lambda self, tokens: tokens << 30)
    with pytest.raises(TuneError, match=r"states of \d+ tokens need \d+\.0 GiB, 2\.0 GiB are free") as error:
        lragent.tune(
            rolled_out_qv.model_dir, rolled_out_qv.adapters, rolled_out_qv.results, tmp_path / "out", options=FEW
        )
    assert "--appended-kl 0" in error.value.hint


def test_free_memory_is_that_of_the_system() -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50


def test_folders_that_are_not_of_tune_stay(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    for existing in ("refuse", "resume", "overwrite"):
        with pytest.raises(TuneError, match="exists and is not of a tuning run"):
            lragent.tune(
                rolled_out_qv.model_dir, rolled_out_qv.adapters, rolled_out_qv.results, full, existing=existing
            )
    parents = rolled_out_qv.adapters["plan"].parent
    with pytest.raises(TuneError, match="adapter plan lies in"):
        lragent.tune(rolled_out_qv.model_dir, rolled_out_qv.adapters, rolled_out_qv.results, parents)


def test_arguments_are_checked_first(rolled_out_qv: RolledOut, tmp_path: Path) -> None:
    given = (rolled_out_qv.model_dir, rolled_out_qv.adapters, rolled_out_qv.results, tmp_path / "out")
    with pytest.raises(RequestError, match="unknown sharing scheme 'all'"):
        lragent.tune(*given, sharing="all")
    with pytest.raises(RequestError, match="2 rounds"):
        lragent.tune(*given, rounds=2)
    for wrong in (
        {"steps": 0},
        {"appended_kl": -1.0},
        {"held_out": 1.0},
        {"kl": 0, "cross_entropy": 0},
        {"train": "c"},
        {"minutes": 0},
    ):
        with pytest.raises(RequestError):
            TuneOptions(**wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
