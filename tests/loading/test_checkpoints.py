"""Base models as they lie on disk: shards, tied embeddings, dtypes, stop tokens, chat templates, GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lragent
from lragent.artifact.directory import open_artifact
from lragent.errors import ModelError
from lragent.loading.model import LoadedModel, load_directories
from lragent.runtime.engine import Engine
from tests.models import VOCAB, WrittenModel, quiet
from tests.models.variants import write_variants
from tests.oracle.peft_oracle import load_peft, load_plain, logprobs

PROMPT = [5, 40, 77, 12, 90, 33, 8, 61]


@pytest.fixture
def model_dir(tiny_llama: WrittenModel, tmp_path: Path) -> Path:
    """A copy that a test may rewrite."""
    return Path(shutil.copytree(tiny_llama.model_dir, tmp_path / "model"))


def _weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer", ""): p for name, p in loaded.model.named_parameters() if ".lora_" not in name}


def test_shards(model_dir: Path, tiny_llama: WrittenModel) -> None:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        (model_dir / "model.safetensors").unlink()
        model.save_pretrained(model_dir, max_shard_size="60KB")
    shards = sorted(model_dir.glob("model-*.safetensors"))
    assert len(shards) > 2
    expected = _weights(load_directories(tiny_llama.model_dir, tiny_llama.adapters))
    found = _weights(load_directories(model_dir, tiny_llama.adapters))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    shards[1].unlink()
    with pytest.raises(ModelError, match="can't load a causal LM"):
        load_directories(model_dir, tiny_llama.adapters)


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    written = write_variants(tmp_path, "llama", {"plan": {}}, tied=True)
    lragent.convert(written.model_dir, written.adapters, tmp_path / "m.lragent", compiled=False)
    artifact = open_artifact(tmp_path / "m.lragent")
    stored = load_file(artifact.directory / "weights" / "base.safetensors")
    assert [name for name, tensor in stored.items() if tensor.shape[0] == VOCAB] == ["model.lm_head.weight"]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["auto", "bfloat16", "float16"])
def test_dtypes(stored: str, wanted: str, model_dir: Path, tiny_llama: WrittenModel) -> None:
    with quiet():
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, stored)).save_pretrained(model_dir)
    loaded = load_directories(model_dir, tiny_llama.adapters, wanted)
    dtype = getattr(torch, stored if wanted == "auto" else wanted)
    assert loaded.dtype == dtype
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert {t.dtype for w in loaded.lora.values() for pair in w.values() for t in (pair.a, pair.b)} == {dtype}


@pytest.mark.parametrize("eos", [7, [7], [127, 3, 9]])
def test_stop_tokens_of_generation_config(eos: Any, model_dir: Path, tiny_llama: WrittenModel) -> None:
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    loaded = load_directories(model_dir, tiny_llama.adapters)
    assert loaded.stop_token_ids == tuple([eos] if isinstance(eos, int) else eos)


def test_without_generation_config_the_config_says_it(model_dir: Path, tiny_llama: WrittenModel) -> None:
    (model_dir / "generation_config.json").unlink()
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "eos_token_id": [11, 12]}))
    assert load_directories(model_dir, tiny_llama.adapters).stop_token_ids == (11, 12)


def test_every_stop_token_ends_a_turn(
    model_dir: Path, tiny_llama: WrittenModel, tmp_path: Path, open_eager: Callable[[Path], Engine]
) -> None:
    out = tmp_path / "m.lragent"
    lragent.convert(model_dir, tiny_llama.adapters, out, compiled=False)
    with open_eager(out).trajectory(PROMPT) as t:
        free = t.generate("plan", max_new_tokens=4, ignore_eos=True).token_ids
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [127, free[0]]}))
    lragent.convert(model_dir, tiny_llama.adapters, out, compiled=False, overwrite=True)
    with open_eager(out).trajectory(PROMPT) as t:
        assert t.generate("plan", max_new_tokens=4).token_ids == free[:1]


@pytest.fixture
def open_eager() -> Callable[[Path], Engine]:
    return lambda path: lragent.load(path, sharing="non_shared", backend="eager", kv_memory="1MiB")


@pytest.mark.parametrize("separate", [True, False], ids=["file", "in tokenizer_config"])
def test_chat_template_goes_with_the_artifact(
    separate: bool, model_dir: Path, tiny_llama: WrittenModel, tmp_path: Path
) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    if separate:
        (model_dir / "chat_template.jinja").write_text(template)
    else:
        file = model_dir / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    out = tmp_path / "m.lragent"
    lragent.convert(model_dir, tiny_llama.adapters, out, compiled=False)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi"


@pytest.fixture(scope="module")
def gguf_file(tiny_llama: WrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama as a GGUF file without quantisation, written tensor by tensor."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_llama.model_dir, path)
    return path


def write_gguf(model_dir: Path, path: Path, scores: bool = True) -> None:
    """What llama.cpp's converter does for a llama: its own names, and rows of q and k in interleaved order."""
    model = load_plain(model_dir, torch.float32)
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    if scores:
        writer.add_token_scores([-float(i) for i in range(config.vocab_size)])
        writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(127)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if "q_proj" in name or "k_proj" in name:
            count = heads if "q_proj" in name else kv_heads
            tensor = tensor.unflatten(0, (count, 2, -1)).swapaxes(1, 2).flatten(0, 2)
        writer.add_tensor(f"{names.get_name(module)}.{leaf}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("given", ["file", "folder"])
def test_gguf_weights_are_those_of_the_model(given: str, gguf_file: Path, tiny_llama: WrittenModel) -> None:
    path = gguf_file if given == "file" else gguf_file.parent
    found = _weights(load_directories(path, tiny_llama.adapters))
    expected = _weights(load_directories(tiny_llama.model_dir, tiny_llama.adapters))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_an_artifact_from_gguf_equals_peft(
    gguf_file: Path, tiny_llama: WrittenModel, tmp_path: Path, open_eager: Callable[[Path], Engine]
) -> None:
    out = tmp_path / "m.lragent"
    folder = Path(shutil.copytree(gguf_file.parent, tmp_path / "gguf"))
    shutil.copy(tiny_llama.model_dir / "tokenizer.json", folder)
    lragent.convert(folder / gguf_file.name, tiny_llama.adapters, out, compiled=False)
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    with open_eager(out).trajectory(PROMPT) as t:
        turn = t.generate("action", max_new_tokens=4, ignore_eos=True)
    ids = PROMPT + turn.token_ids
    exact, single = (
        logprobs(load_peft(tiny_llama.model_dir, tiny_llama.adapters, dtype), ids, "action")[len(PROMPT) - 1 : -1]
        for dtype in (torch.float64, torch.float32)
    )
    chosen = torch.tensor(turn.token_ids)[:, None]
    allowed = max(4 * float((single - exact).gather(1, chosen).abs().max()), 1e-6)
    found = torch.tensor(turn.logprobs, dtype=torch.float64)
    assert float((found - exact.gather(1, chosen)[:, 0]).abs().max()) <= allowed


def test_the_tokenizer_inside_a_gguf_file(gguf_file: Path, tiny_llama: WrittenModel, tmp_path: Path) -> None:
    lragent.convert(gguf_file, tiny_llama.adapters, tmp_path / "m.lragent", compiled=False)
    engine = lragent.load(tmp_path / "m.lragent", backend="eager", kv_memory="1MiB")
    assert engine.tokenizer is not None
    assert AutoTokenizer.from_pretrained(tmp_path / "m.lragent" / "tokenizer").convert_ids_to_tokens(5) == "<5>"


def test_a_tokenizer_that_can_not_be_read_from_gguf(tiny_llama: WrittenModel, tmp_path: Path) -> None:
    write_gguf(tiny_llama.model_dir, tmp_path / "bare.gguf", scores=False)
    with pytest.raises(ModelError, match=r"tokenizer in .*bare\.gguf can't be read.*\nPut the model's tokenizer\.json"):
        lragent.convert(tmp_path / "bare.gguf", tiny_llama.adapters, tmp_path / "m.lragent", compiled=False)


def test_several_gguf_files_are_named(gguf_file: Path, tiny_llama: WrittenModel, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gguf_file, tmp_path / name)
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\)\nGive one of them"):
        load_directories(tmp_path, tiny_llama.adapters)


def test_a_damaged_gguf_file(gguf_file: Path, tiny_llama: WrittenModel, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't load a causal LM from"):
        load_directories(tmp_path / "cut.gguf", tiny_llama.adapters)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(model_dir: Path, tiny_llama: WrittenModel, value: float) -> None:
    _rewrite(model_dir, lambda tensors: tensors["model.embed_tokens.weight"].view(-1)[5:6].fill_(value))
    with pytest.raises(ModelError, match=r"weight model\.embed_tokens\.weight holds infinite values or NaN as float32"):
        load_directories(model_dir, tiny_llama.adapters)


def test_a_weight_that_overflows_float16_is_named(model_dir: Path, tiny_llama: WrittenModel) -> None:
    _rewrite(model_dir, lambda tensors: tensors["model.norm.weight"][0].fill_(1e6))
    load_directories(model_dir, tiny_llama.adapters)
    with pytest.raises(ModelError, match=r"weight model\.norm\.weight holds infinite values or NaN as float16"):
        load_directories(model_dir, tiny_llama.adapters, "float16")


def test_a_weight_of_another_shape_is_named(
    model_dir: Path, tiny_llama: WrittenModel, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    with pytest.raises(ModelError, match=rf"weight \S+ has shape \[{VOCAB}, 64\], config.json wants \[64, 64\]"):
        load_directories(model_dir, tiny_llama.adapters)
    assert "REPORT" not in capfd.readouterr().err


def test_a_stop_token_that_is_none_is_named(model_dir: Path, tiny_llama: WrittenModel) -> None:
    (model_dir / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelError, match="eos_token_id is '</s>'"):
        load_directories(model_dir, tiny_llama.adapters)


def _rewrite(model_dir: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(model_dir / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
