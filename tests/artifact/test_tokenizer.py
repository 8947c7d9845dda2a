"""The tokenizer on its way from a model's and its adapters' folders into an artifact and an engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import lragent
from lragent.artifact.directory import open_artifact
from lragent.errors import AdapterError, ArtifactError, RequestError
from lragent.runtime.engine import Engine
from lragent.text.load_tokenizer import tokenizer_files
from tests.models import EOS, WrittenModel
from tests.oracle.peft_oracle import load_peft

SPECIAL = 110  # has the text "<110>" in the vocabulary, and is no added token


@pytest.fixture
def written(tiny_llama: WrittenModel, tmp_path: Path) -> WrittenModel:
    """A copy that a test may rewrite."""
    model_dir = Path(shutil.copytree(tiny_llama.model_dir, tmp_path / "model"))
    return WrittenModel(
        model_dir,
        {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in tiny_llama.adapters.items()},
    )


def bring(written: WrittenModel, *names: str, eos: str = "<eos>", template: str | None = None) -> None:
    """Writes a tokenizer into the folders of adapters: the model's, and one token more."""
    held = AutoTokenizer.from_pretrained(written.model_dir)
    held.add_tokens([f"<{SPECIAL}>"], special_tokens=True)
    held.eos_token, held.chat_template = eos, template
    for name in names:
        held.save_pretrained(written.adapters[name])


def converted(written: WrittenModel, out: Path) -> tuple[lragent.ConvertReport, Engine]:
    report = lragent.convert(written.model_dir, written.adapters, out, compiled=False)
    return report, opened(out)


def opened(out: Path) -> Engine:
    return lragent.load(out, backend="eager", kv_memory="1MiB")


def first_ids(engine: Engine, text: str = f"<{SPECIAL}>") -> list[int]:
    with engine.trajectory(text) as t:
        return t.token_ids


def test_no_tokenizer_is_reported(written: WrittenModel, tmp_path: Path) -> None:
    for file in tokenizer_files(written.model_dir):
        file.unlink()
    report, engine = converted(written, tmp_path / "m.lragent")
    assert report.tokenizer == ("no tokenizer was found: trajectories take token ids only",)
    assert engine.tokenizer is None and not (tmp_path / "m.lragent" / "tokenizer").exists()
    with pytest.raises(RequestError, match="text needs a tokenizer"):
        engine.trajectory("text")


def test_the_tokenizer_of_adapters_that_agree_is_the_artifact_s(written: WrittenModel, tmp_path: Path) -> None:
    bring(written, "plan", "action")
    report, engine = converted(written, tmp_path / "m.lragent")
    assert first_ids(engine) == [SPECIAL]
    assert report.tokenizer[0].startswith("the tokenizer is that of plan, action: ")


def test_adapters_with_tokenizers_that_differ_are_refused(written: WrittenModel, tmp_path: Path) -> None:
    bring(written, "plan")
    AutoTokenizer.from_pretrained(written.model_dir).save_pretrained(written.adapters["action"])
    with pytest.raises(AdapterError, match=r"adapters plan and action bring tokenizers that encode differently: "):
        converted(written, tmp_path / "m.lragent")
    assert not (tmp_path / "m.lragent").exists()


def test_a_tokenizer_of_an_adapter_that_can_not_be_read_is_named(written: WrittenModel, tmp_path: Path) -> None:
    (written.adapters["action"] / "tokenizer.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter action: the tokenizer in .* can't be read"):
        converted(written, tmp_path / "m.lragent")


def test_an_adapter_s_own_end_of_text_stops_its_turns_only(
    written: WrittenModel, eager_artifact: Path, tmp_path: Path
) -> None:
    agents, prompt = ("plan", "action", "base"), [5, 40, 77, 12]
    plain = {agent: _turn(opened(eager_artifact), agent, prompt).token_ids for agent in agents}
    held = AutoTokenizer.from_pretrained(written.model_dir)
    stop = plain["plan"][2]
    bring(written, "plan", eos=held.convert_ids_to_tokens(stop))
    report, engine = converted(written, tmp_path / "m.lragent")
    turn = _turn(engine, "plan", prompt)
    assert turn.token_ids == plain["plan"][: plain["plan"].index(stop) + 1]
    assert (turn.finish_reason, turn.stop_reason) == ("stop", stop)
    for agent in agents[1:]:
        assert _turn(engine, agent, prompt).token_ids == plain[agent]
    assert any(note.startswith("plan also stops at") for note in report.tokenizer)
    with engine.trajectory(prompt) as t:
        assert t.generate("plan", max_new_tokens=8, ignore_eos=True).token_ids == plain["plan"]


def _turn(engine: Engine, agent: str, prompt: list[int]) -> lragent.Turn:
    with engine.trajectory(prompt) as t:
        return t.generate(agent, max_new_tokens=8)


def test_the_end_of_text_of_the_model_s_tokenizer_is_a_stop(written: WrittenModel, tmp_path: Path) -> None:
    held = AutoTokenizer.from_pretrained(written.model_dir)
    held.eos_token = f"<{SPECIAL}>"
    held.save_pretrained(written.model_dir)
    converted(written, tmp_path / "m.lragent")
    assert open_artifact(tmp_path / "m.lragent").manifest.stop_token_ids == (EOS, SPECIAL)


def test_an_adapter_s_own_chat_template(written: WrittenModel, tmp_path: Path) -> None:
    (written.model_dir / "chat_template.jinja").write_text("model {{ messages[0].content }}")
    bring(written, "plan", template="plan {{ messages[0].content }}")
    _, engine = converted(written, tmp_path / "m.lragent")
    messages = [{"role": "user", "content": "hi"}]
    rendered = [engine.tokenizer.render_chat(messages, agent) for agent in ("plan", "action")]  # type: ignore[union-attr]
    assert rendered == ["plan hi", "model hi"]


def test_update_puts_another_tokenizer_into_the_artifact(written: WrittenModel, tmp_path: Path) -> None:
    out = tmp_path / "m.lragent"
    _, engine = converted(written, out)
    before = first_ids(engine)
    assert len(before) == len(f"<{SPECIAL}>")
    report = lragent.update(out, written.model_dir, written.adapters)
    assert open_artifact(out).manifest.tokenizer[0].path.startswith("tokenizer/")
    bring(written, "plan", eos=f"<{SPECIAL}>", template="own")
    report = lragent.update(out, written.model_dir, written.adapters)
    assert first_ids(opened(out)) == [SPECIAL]
    assert any("the tokenizer is that of plan" in note for note in report.tokenizer)
    manifest = open_artifact(out).manifest
    assert {agent.name: agent.stop_token_ids for agent in manifest.agents}["plan"] == (SPECIAL,)
    folders = [path.name for path in out.iterdir() if path.name.startswith("tokenizer")]
    assert folders == [manifest.tokenizer[0].path.partition("/")[0]]
    for file in tokenizer_files(written.adapters["plan"]):
        file.unlink()
    lragent.update(out, written.model_dir, written.adapters)
    assert first_ids(opened(out)) == before
    assert not any(agent.stop_token_ids for agent in open_artifact(out).manifest.agents)


def test_a_damaged_tokenizer_is_named(tiny_llama: WrittenModel, eager_artifact: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(eager_artifact, tmp_path / "m.lragent"))
    file = out / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json has \d+ bytes, the manifest says"):
        opened(out)


def test_optimize_takes_a_live_tokenizer_and_saves_it(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    held = AutoTokenizer.from_pretrained(tiny_llama.model_dir)
    held.backend_tokenizer.enable_truncation(3)
    held.chat_template = {"default": "D", "tool_use": "T"}
    model = load_peft(tiny_llama.model_dir, tiny_llama.adapters, torch.float32)
    engine = lragent.optimize(model, tokenizer=held, backend="eager", kv_memory="1MiB")
    assert len(first_ids(engine, "Five words")) == 10
    assert held.backend_tokenizer.truncation["max_length"] == 3
    engine.save(tmp_path / "m.lragent")
    again = opened(tmp_path / "m.lragent")
    assert first_ids(again, "Five words") == first_ids(engine, "Five words")
    config = AutoTokenizer.from_pretrained(tmp_path / "m.lragent" / "tokenizer")
    assert config.chat_template == held.chat_template


def test_optimize_takes_a_folder(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    model = load_peft(tiny_llama.model_dir, tiny_llama.adapters, torch.float32)
    folder = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(tiny_llama.model_dir).save_pretrained(folder)
    engine = lragent.optimize(model, tokenizer=folder, backend="eager", kv_memory="1MiB")
    assert first_ids(engine, "ab") == [ord("a") - 32, ord("b") - 32]
    for given, message in ((tmp_path, "no tokenizer in"), (object(), "tokenizer is a object")):
        with pytest.raises(RequestError, match=message):
            lragent.optimize(model, tokenizer=given, backend="eager", kv_memory="1MiB")
