"""Tokenizers as they lie in folders: loaded as transformers does, saved, and loaded again."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from lragent.errors import UserError
from lragent.text.load_tokenizer import live_tokenizer, load_tokenizer, tokenizer_files
from lragent.text.save_tokenizer import save_tokenizer
from lragent.text.transformers_tokenizer import TransformersTokenizer
from tests.text.builders import CORPUS, SPECIAL, byte_level, with_bos, words


def saved(held: PreTrainedTokenizerFast, folder: Path) -> Path:
    held.save_pretrained(folder)
    return folder


def test_a_stored_truncation_does_not_cut_and_a_stored_padding_does_not_fill(tmp_path: Path) -> None:
    held = byte_level()
    held.pad_token = "</s>"
    held("x" * 64, truncation=True, max_length=16, padding="max_length")
    assert json.loads((saved(held, tmp_path) / "tokenizer.json").read_text())["truncation"]["max_length"] == 16
    loaded = TransformersTokenizer(load_tokenizer(tmp_path))
    assert len(loaded.encode("x" * 40, add_special_tokens=True)) == 40
    assert len(loaded.encode_piece("hi")) == 2
    save_tokenizer(loaded.source, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text())["truncation"] is None


def test_tokens_that_only_the_config_names_are_known(tmp_path: Path) -> None:
    file, config = saved(byte_level(), tmp_path) / "tokenizer.json", tmp_path / "tokenizer_config.json"
    tokens = json.loads(file.read_text())
    later = [token for token in tokens["added_tokens"] if token["content"] in SPECIAL]
    tokens["added_tokens"] = tokens["added_tokens"][:-4]
    assert later and not {token["content"] for token in tokens["added_tokens"]} & set(SPECIAL)
    file.write_text(json.dumps(tokens))
    decoder = {str(token["id"]): {name: token[name] for name in token if name != "id"} for token in later}
    more = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **more}))
    save_tokenizer(load_tokenizer(tmp_path), tmp_path / "again", tmp_path)
    text = "<|im_start|>user\nhi<|im_end|>"
    loaded = TransformersTokenizer(load_tokenizer(tmp_path / "again"))
    assert loaded.encode(text, add_special_tokens=True) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    end = later[-1]["id"]
    assert (loaded.eos_token_id, loaded.decode([104, end], True)) == (end, loaded.decode([104], True))


def test_older_files_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": len(model["vocab"])}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    expected = AutoTokenizer.from_pretrained(tmp_path)(CORPUS)["input_ids"]
    assert len(expected) < len(CORPUS)
    save_tokenizer(load_tokenizer(tmp_path), tmp_path / "again", tmp_path)
    assert load_tokenizer(tmp_path / "again")(CORPUS)["input_ids"] == expected


def write_ctrl(folder: Path) -> Path:
    """A tokenizer that transformers has in Python only."""
    AutoConfig.for_model("ctrl").save_pretrained(folder)
    tokens = [*"abcdefgh", *(f"{letter}@@" for letter in "abcdefgh"), "<unk>", "ab"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return folder


def test_a_tokenizer_in_python_only(tmp_path: Path) -> None:
    folder = write_ctrl(tmp_path)
    (folder / "added_tokens.json").write_text('{"<go>": 18}')
    source = load_tokenizer(folder)
    save_tokenizer(source, tmp_path / "again")
    loaded = TransformersTokenizer(load_tokenizer(tmp_path / "again"))
    assert not loaded.source.is_fast
    assert loaded.encode("ab <go>", add_special_tokens=True) == [17, 18]
    assert loaded.encode_piece("ab <go>") == [17, 18]
    assert 18 not in loaded.encode_piece("ab <go> ab", parse_special=False)
    assert loaded.changed_text() is not None


def test_all_chat_templates_are_saved(tmp_path: Path) -> None:
    held = byte_level()
    held.chat_template = {"default": "D {{ messages[0].content }}", "tool_use": "T {{ messages[0].content }}"}
    save_tokenizer(held, tmp_path / "again")
    loaded = TransformersTokenizer(
        load_tokenizer(tmp_path / "again"), {"plan": {"default": "P {{ messages[0].content }}"}}
    )
    messages = [{"role": "user", "content": "hi"}]
    assert loaded.render_chat(messages) == "D hi"
    assert loaded.render_chat(messages, chat_template="tool_use") == "T hi"
    assert loaded.render_chat(messages, agent="plan") == "P hi"
    assert loaded.render_chat(messages, agent="action") == "D hi"


def test_a_tokenizer_that_can_not_be_saved_is_refused(tmp_path: Path) -> None:
    """An attribute that was set after loading isn't saved: here, special tokens in a text are split."""
    folder = saved(byte_level(), tmp_path / "given")
    changed = load_tokenizer(folder)
    changed.split_special_tokens = True
    with pytest.raises(UserError, match="can't be saved: loaded again, it encodes"):
        save_tokenizer(changed, tmp_path / "again", folder)
    assert not (tmp_path / "again").exists()


def test_original_files_are_copied_if_transformers_saves_less_than_it_loads(tmp_path: Path) -> None:
    held = words()
    held.add_tokens([".", " ."])
    held.clean_up_tokenization_spaces = True
    held.init_kwargs["clean_up_tokenization_spaces"] = True
    held.chat_template = {"default": "D", "tool_use": "T"}
    source = load_tokenizer(saved(held, tmp_path / "given"))
    source.init_kwargs.pop("clean_up_tokenization_spaces")  # as of a class that doesn't save a setting
    with pytest.raises(UserError, match="loaded again, it decodes"):
        save_tokenizer(source, tmp_path / "again")
    save_tokenizer(source, tmp_path / "again", tmp_path / "given")
    again = load_tokenizer(tmp_path / "again")
    assert again.clean_up_tokenization_spaces and again.chat_template == held.chat_template


def test_a_rendered_chat_gets_no_second_bos() -> None:
    loaded = TransformersTokenizer(with_bos(byte_level()))
    bos = loaded.source.bos_token_id
    plain = loaded.encode("hi", add_special_tokens=False)
    assert loaded.encode("hi", add_special_tokens=True) == [bos, *plain]
    assert loaded.encode("<s>hi", add_special_tokens=True) == [bos, *plain]
    assert loaded.encode("<s><s>hi", add_special_tokens=True) == [bos, bos, *plain]
    assert loaded.encode("<s>", add_special_tokens=True) == [bos]


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    names = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(UserError, match=r"Python code of its own .*which is never run"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content", "hidden", "named"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>", "sentencepiece", "sentencepiece"),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>", "google.protobuf", "protobuf"),
        ("tokenizer.model", base64.b64encode(b"a") + b" 0\n", "tiktoken", "tiktoken"),
    ],
)
def test_a_missing_package_is_named(
    file: str, content: bytes, hidden: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    for name in [hidden, *(name for name in sys.modules if name.startswith(f"{hidden}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"tokenizer in .* needs {named}, not installed here\npip install {named}"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_file_is_read(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS * 20)
    SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=340,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    loaded = TransformersTokenizer(load_tokenizer(tmp_path))
    save_tokenizer(loaded.source, tmp_path / "again", tmp_path)
    expected = SentencePieceProcessor(str(tmp_path / "tokenizer.model")).encode("the town")
    assert loaded.encode("the town", add_special_tokens=False) == expected
    assert loaded.decode_piece(loaded.encode_piece(" \u65e5 the"), False) == " \u65e5 the"


def test_a_tiktoken_file_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    loaded = TransformersTokenizer(load_tokenizer(tmp_path))
    assert loaded.encode_piece("h\u00e9") == [104, *"\u00e9".encode()]
    save_tokenizer(loaded.source, tmp_path / "again", tmp_path)


def test_files_without_a_vocabulary_are_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    assert tokenizer_files(tmp_path) == []
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_files(tmp_path) != []
    with pytest.raises(UserError, match="has no vocabulary"):
        load_tokenizer(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (saved(byte_level(), tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"tokenizer in {tmp_path} can't be read"):
        load_tokenizer(tmp_path)


def test_a_live_tokenizer_is_copied() -> None:
    held = words()
    held.backend_tokenizer.enable_truncation(1)
    copied = live_tokenizer(held)
    assert copied("hello world")["input_ids"] == [1, 2]
    assert held.backend_tokenizer.truncation["max_length"] == 1
    with pytest.raises(UserError, match="tokenizer is a Tokenizer"):
        live_tokenizer(held.backend_tokenizer)


LOADING = """
import sys
from pathlib import Path
from lragent.text.load_tokenizer import load_tokenizer
load_tokenizer(Path(sys.argv[1]))
print([name for name in sys.modules if name.startswith("transformers.models.llama.modeling")])
"""


def test_no_code_of_a_model_is_imported(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(saved(byte_level(), tmp_path))
    done = subprocess.run([sys.executable, "-c", LOADING, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
