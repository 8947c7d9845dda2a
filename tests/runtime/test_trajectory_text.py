"""Text of trajectories over real tokenizers: pieces joined, whole starts, forks and cuts."""

from dataclasses import replace

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from lragent.errors import RequestError
from lragent.program.program import Program
from lragent.program.step import CacheTensors, StepInputs
from lragent.runtime import Engine, EngineConfig
from lragent.text.transformers_tokenizer import TransformersTokenizer
from tests.runtime.random_operations import toy_engine
from tests.runtime.toy_program import VOCAB, toy_program
from tests.text.builders import EXACT, byte_fallback, byte_level, with_bos, words

WIDE = 400


def engine_with(held: PreTrainedTokenizerFast, vocab_size: int = WIDE) -> Engine:
    """The toy model with more tokens: each is processed as one of the toy's, and never sampled."""
    toy = toy_program("split")

    def run(step: StepInputs, cache: CacheTensors) -> torch.Tensor:
        logits_RV = toy.run(replace(step, token_ids=step.token_ids % VOCAB), cache)
        return torch.nn.functional.pad(logits_RV, (0, vocab_size - VOCAB), value=-1e9)

    program = Program(toy.schema, toy.agents, toy.max_positions, vocab_size, run, {})
    config = EngineConfig("base_lr_shared", kv_memory="1MB", kv_dtype=torch.float64, page_size=4)
    return Engine(program, config, TransformersTokenizer(held))


@pytest.mark.parametrize("kind", EXACT)
def test_the_text_is_the_pieces_joined(kind: str) -> None:
    held = with_bos(EXACT[kind]())
    engine = engine_with(held)
    assert engine.tokenizer is not None
    with engine.trajectory("Question: who?") as t:
        assert t.token_ids == held("Question: who?")["input_ids"]
        t.append("\nPlan:")
        turn = t.generate("plan", forced=engine.tokenizer.encode_piece(" the town</s>"))
        t.append("<|im_end|>the")
        t.append("\u65e5 <think>", parse_special=False)
        assert turn.text == " the town"
        assert t.text == "Question: who?\nPlan: the town</s><|im_end|>the\u65e5 <think>"
        assert t.fork().text == t.text


def test_a_rendered_chat_has_one_bos_and_keeps_its_text() -> None:
    """Llama 2's tokenizer puts a space after a special token; the text stays the given one."""
    engine = engine_with(with_bos(byte_fallback()))
    with engine.trajectory("<s><|im_start|>user") as t:
        assert t.token_ids.count(1) == 1
        assert t.text == "<s><|im_start|>user"


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "unigram"])
def test_half_a_character_is_replaced_in_a_turn_and_whole_in_the_trajectory(kind: str) -> None:
    engine = engine_with(EXACT[kind]())
    assert engine.tokenizer is not None
    euro = engine.tokenizer.encode_piece("\u20ac")
    with engine.trajectory("a") as t:
        first = t.generate("plan", forced=euro[:2])
        second = t.generate("act", forced=euro[2:])
        t.append("\u65e5")
        assert (first.text, second.text) == ("\ufffd", "\ufffd")
        assert t.text == "a\u20ac\u65e5"


def test_half_a_character_does_not_spoil_the_next_one() -> None:
    engine = engine_with(byte_fallback())
    assert engine.tokenizer is not None
    with engine.trajectory("a") as t:
        t.generate("plan", forced=engine.tokenizer.encode_piece("\u20ac")[:2])
        t.append("\u65e5")
        assert t.text == "a\ufffd\u65e5"


def test_text_after_a_cut() -> None:
    engine = engine_with(with_bos(byte_fallback()))
    with engine.trajectory("Question: who?") as t:
        start = len(t)
        t.append(" more")
        t.truncate(start)
        assert t.text == "Question: who?"
        t.truncate(start - 1)
        t.append("!")
        assert t.text == "Question: who!"
        t.truncate(1)
        assert t.text == ""
        t.append(" Q")
        assert t.text == " Q"


def test_token_ids_read_as_they_are() -> None:
    engine = engine_with(with_bos(byte_fallback()))
    assert engine.tokenizer is not None
    with engine.trajectory(engine.tokenizer.encode("the", add_special_tokens=True)) as t:
        assert t.text == "<s> the"


def test_text_that_the_tokenizer_changes_is_that_of_transformers() -> None:
    held = byte_level(prefix_space=True, normalizer=normalizers.NFKC())
    with engine_with(held).trajectory("\u2460 e\u0301") as t:
        t.append("\ufb01")
        assert t.text == held.decode(t.token_ids) == " 1 \u00e9fi"
    with engine_with(words()).trajectory("Hello") as t:
        t.append("world")
        assert t.text == "hello world"


def test_text_with_a_token_that_the_model_lacks_is_refused() -> None:
    engine = engine_with(byte_level(), vocab_size=305)
    for add in (engine.trajectory, engine.trajectory().append):
        with pytest.raises(RequestError, match=r"token '<think>' \(id 305\), .* vocabulary has 305 tokens"):
            add("a<think>")


def test_text_needs_a_tokenizer() -> None:
    with toy_engine("base_lr_shared").trajectory([1, 2]) as t, pytest.raises(RequestError, match="needs a tokenizer"):
        _ = t.text
