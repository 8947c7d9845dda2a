import asyncio
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from lragent.errors import InternalError, RequestError
from lragent.program.program import Program
from lragent.program.step import CacheTensors, StepInputs
from lragent.runtime import Engine, EngineConfig, Turn, TurnSegment
from lragent.runtime.turn import NONE_IS_DEFAULT, TurnArguments, TurnOptions
from tests.runtime.random_operations import toy_engine
from tests.runtime.toy_program import AGENTS, toy_program
from tests.runtime.toy_tokenizer import BOS, EOS, ToyTokenizer, piece_id


def text_engine(sharing: str = "base_lr_shared", **options: object) -> Engine:
    config = EngineConfig(
        sharing,
        kv_memory="1MB",
        kv_dtype=torch.float64,
        page_size=4,
        stop_token_ids=(EOS,),
        **options,  # type: ignore[arg-type]
    )
    return Engine(toy_program("split"), config, tokenizer=ToyTokenizer())


def test_special_tokens_come_with_the_start_only_and_pieces_stay_apart() -> None:
    with text_engine().trajectory("a") as t:
        t.append("b")
        assert t.token_ids == [BOS, piece_id(b"a"), piece_id(b"b")]
        assert t.segments() == [TurnSegment(None, 0, 2), TurnSegment(None, 2, 3)]


def test_text_leaves_out_stop_string_but_the_trajectory_keeps_every_token() -> None:
    with text_engine().trajectory("abc") as t:
        turn = t.generate("plan", max_new_tokens=30, ignore_eos=True)
        middle = ToyTokenizer().decode(turn.token_ids[4:6], skip_special_tokens=True)
        t.truncate(len(t) - len(turn.token_ids))
        stopped = t.generate("plan", max_new_tokens=30, ignore_eos=True, stop=middle)
        assert stopped.finish_reason == "stop"
        assert middle not in stopped.text
        assert turn.text.startswith(stopped.text)
        assert stopped.token_ids == turn.token_ids[: len(stopped.token_ids)]
        last = t.segments()[-1]
        assert (last.agent, last.start, last.end) == ("plan", len(t) - len(stopped.token_ids), len(t))
        assert (last.seed, last.finish_reason) == (stopped.seed, "stop")
        assert t.logprobs[-len(stopped.token_ids) :] == stopped.logprobs
        assert t.logprobs[0] is None


def test_stop_tokens_ignore_eos_and_given_ids() -> None:
    with text_engine().trajectory("abc") as t:
        plain = t.fork().generate("plan", max_new_tokens=8, ignore_eos=True)
        stop = plain.token_ids[3]
        first = plain.token_ids.index(stop)
        given = t.fork().generate("plan", max_new_tokens=8, ignore_eos=True, stop_token_ids=[stop])
        assert given.token_ids == plain.token_ids[: first + 1]
        assert given.finish_reason == "stop"
    config = EngineConfig("base_lr_shared", kv_memory="1MB", kv_dtype=torch.float64, stop_token_ids=[stop])
    engine = Engine(toy_program("split"), config)
    with engine.trajectory([BOS, *ToyTokenizer().encode("abc", add_special_tokens=False)]) as t:
        assert t.fork().generate("plan", max_new_tokens=8).token_ids == given.token_ids
        assert t.generate("plan", max_new_tokens=8, ignore_eos=True).token_ids == plain.token_ids


def test_forced_tokens_are_never_stopped_at() -> None:
    with text_engine().trajectory("abc") as t:
        turn = t.generate("plan", forced=[EOS, 5, EOS], stop="b")
        assert (turn.token_ids, turn.finish_reason, len(turn.logprobs)) == ([EOS, 5, EOS], "length", 3)
        assert turn.usage.decode == 2


def test_the_same_seed_gives_the_same_tokens() -> None:
    engine = toy_engine("base_lr_shared")
    with engine.trajectory([1, 2, 3]) as t:
        draws = [t.fork().generate("act", max_new_tokens=12, temperature=1.5, seed=s).token_ids for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_sampling_with_every_filter() -> None:
    with toy_engine("base_lr_shared").trajectory([1, 2, 3]) as t:
        greedy = t.fork().generate("act", max_new_tokens=6).token_ids
        assert t.generate("act", max_new_tokens=6, temperature=1.0, top_k=1, top_p=0.9, min_p=0.1).token_ids == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True, must be a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens is None, must be a whole number"),
        ({"top_k": 1.5}, "top_k is 1.5, must be a whole number"),
        ({"top_p": "0.9"}, "top_p is '0.9', must be a finite number"),
        ({"temperature": float("nan")}, "temperature is nan, must be a finite number"),
        ({"temperature": float("inf")}, "temperature is inf, must be a finite number"),
        ({"temperature": 10**400}, "must be a finite number"),
        ({"min_p": False}, "min_p is False, must be a finite number"),
        ({"seed": 0.5}, "seed is 0.5, must be a whole number"),
        ({"ignore_eos": None}, "ignore_eos is None, must be True or False"),
        ({"stop": 5}, "stop is 5, must be a string or strings"),
        ({"stop": ["a", 5]}, r"stop is \['a', 5\], must be a string or strings"),
        ({"stop": b"a"}, "stop is b'a', must be a string or strings"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5, must be whole numbers"),
        ({"stop_token_ids": ["a"]}, "must be whole numbers"),
        ({"forced": 5}, "forced is 5, must be a sequence of token ids"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"forced": []}, "forced"),
        ({"forced": [1000]}, "vocabulary of 40"),
        ({"stop": [""]}, "empty string"),
        ({"stop": "x"}, "tokenizer"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with toy_engine("base_lr_shared").trajectory([1, 2]) as t, pytest.raises(RequestError, match=message):
        t.generate("plan", **options)  # type: ignore[arg-type]


def test_none_is_the_default_of_options_that_can_be_off() -> None:
    with toy_engine("base_lr_shared").trajectory([1, 2, 3]) as t:
        plain = t.fork().generate("act", max_new_tokens=6)
        off = dict.fromkeys(("stop", "stop_token_ids", "temperature", "top_k", "top_p", "min_p", "seed", "forced"))
        assert t.generate("act", max_new_tokens=6, **off).token_ids == plain.token_ids  # type: ignore[arg-type]


def test_numbers_of_other_libraries_are_taken() -> None:
    with toy_engine("base_lr_shared").trajectory([1, 2, 3]) as t:
        options: Any = {"max_new_tokens": np.int64(6), "temperature": np.float32(1.5), "seed": np.int64(1), "top_k": 30}
        turn = t.fork().generate("act", **options, stop_token_ids=torch.tensor([39]))
        plain = t.generate("act", max_new_tokens=6, temperature=1.5, seed=1, top_k=30, stop_token_ids=[39])
        assert (turn.token_ids, turn.seed) == (plain.token_ids, 1) and type(turn.seed) is int


def test_bad_calls() -> None:
    engine = toy_engine("base_lr_shared")
    assert engine.agents == ("base", *AGENTS)
    with pytest.raises(RequestError, match="tokenizer"):
        engine.trajectory("text")
    with pytest.raises(RequestError, match="token id 40"):
        engine.trajectory([40])
    for ids in ([1.5], ["a"], None, 5):
        with pytest.raises(RequestError, match="whole numbers"):
            engine.trajectory().append(ids)  # type: ignore[arg-type]
    with engine.trajectory() as t:
        with pytest.raises(RequestError, match="empty"):
            t.generate("plan")
        t.append([1])
        with pytest.raises(RequestError, match="Agents are: base, plan, act, reflect"):
            t.generate("nobody")
        with pytest.raises(RequestError, match="truncate to 5"):
            t.truncate(5)
        with pytest.raises(RequestError, match="no tokens"):
            t.score("plan", [])
    with pytest.raises(RequestError, match="closed"):
        t.append([1])


@pytest.mark.parametrize(("sharing", "layout"), [("full_shared", "split"), ("rebase_shared", "dense")])
def test_a_program_of_the_wrong_layout(sharing: str, layout: str) -> None:
    with pytest.raises(RequestError, match=f"the program has {layout}"):
        Engine(toy_program(layout), EngineConfig(sharing))  # type: ignore[arg-type]


def test_turn_arguments_are_the_fields_of_turn_options() -> None:
    assert TurnArguments.__annotations__.keys() == {field.name for field in fields(TurnOptions)}
    options = get_type_hints(TurnOptions)
    assert get_type_hints(TurnArguments) == {
        name: hint | None if name in NONE_IS_DEFAULT else hint for name, hint in options.items()
    }


def test_an_unknown_turn_option_is_refused_with_the_known_ones() -> None:
    with text_engine().trajectory("abc") as t:
        with pytest.raises(RequestError, match=r"'top_k_'\nOptions are: max_new_tokens, stop, .*forced"):
            t.generate("plan", top_k_=3)  # type: ignore[call-arg]
        with pytest.raises(RequestError, match="'max_tokens'"):
            asyncio.run(t.agenerate("plan", max_tokens=3))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharing": "shared"}, "unknown sharing scheme 'shared'"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0, must be at least 1"),
        ({"page_size": 0}, "page_size is 0, must be at least 1"),
        ({"threads": 0}, "threads is 0, must be from 1"),
    ],
)
def test_bad_engine_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EngineConfig(**{"sharing": "non_shared", **options})


def test_one_turn_at_a_time() -> None:
    engine = toy_engine("base_lr_shared")

    async def run() -> None:
        t = engine.trajectory([1, 2, 3])
        turn = asyncio.ensure_future(t.agenerate("plan", max_new_tokens=5))
        await asyncio.sleep(0)
        for action in (t.fork, lambda: t.append([1]), lambda: t.truncate(1), lambda: t.generate("act")):
            with pytest.raises(RequestError, match="in progress"):
                action()
        assert len((await turn).token_ids) == 5
        closing = asyncio.ensure_future(t.agenerate("plan", max_new_tokens=5))
        await asyncio.sleep(0)
        t.close()
        with pytest.raises(RequestError, match="closed during a turn"):
            await closing

    asyncio.run(run())
    assert engine.stats().pages_held == 0


def test_a_cancelled_turn_leaves_the_trajectory_as_it_was() -> None:
    engine = toy_engine("rebase_shared")

    async def run() -> None:
        with engine.trajectory([1, 2, 3]) as t:
            turn = asyncio.ensure_future(t.agenerate("plan", max_new_tokens=50))
            for _ in range(5):
                await asyncio.sleep(0)
            turn.cancel()
            await asyncio.gather(turn, return_exceptions=True)
            assert t.token_ids == [1, 2, 3]
            assert t.segments() == [TurnSegment(None, 0, 3)]
            again = await t.agenerate("act", max_new_tokens=4)
            with engine.trajectory([1, 2, 3]) as other:
                assert again.token_ids == other.generate("act", max_new_tokens=4).token_ids

    asyncio.run(run())
    assert engine.stats().pages_held == 0


def test_an_error_of_the_program_ends_all_turns_and_not_the_engine() -> None:
    plain = toy_program("split")
    fail = [True]

    def run_or_fail(step: StepInputs, cache: CacheTensors) -> object:
        if fail[0]:
            raise InternalError("kernel broke")
        return plain.run(step, cache)

    program = Program(plain.schema, plain.agents, plain.max_positions, plain.vocab_size, run_or_fail, {})  # type: ignore[arg-type]
    engine = Engine(program, EngineConfig("rebase_shared", kv_memory="1MB", kv_dtype=torch.float64, page_size=4))

    async def run() -> list[object]:
        group = [engine.trajectory([1, 2, 3, i]) for i in range(3)]
        turns = await asyncio.gather(*(t.agenerate("plan") for t in group), return_exceptions=True)
        for t in group:
            t.close()
        return list(turns)

    assert all(isinstance(error, InternalError) for error in asyncio.run(run()))
    engine.check_integrity()
    with engine.trajectory([1, 2, 3]) as t:
        with pytest.raises(InternalError):
            t.generate("plan")
        fail[0] = False
        assert len(t.generate("plan", max_new_tokens=4).token_ids) == 4
    assert engine.stats().pages_held == 0
    engine.check_integrity()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(
    "options", [{"forced": [5, 6]}, {}, {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.5}], ids=str
)
def test_logits_that_are_unusable_end_the_turn_and_no_other(bad: float, options: Any) -> None:
    """The row of a token 39 is bad: one logit of it, or, for -inf, all."""
    plain = toy_program("split")

    def one_bad(step: StepInputs, cache: CacheTensors) -> torch.Tensor:
        logits_RV = plain.run(step, cache)
        rows_R1 = step.token_ids[step.logits_rows, None] == 39
        tokens_V = torch.arange(logits_RV.shape[1]) == 7
        return torch.where(rows_R1 & (tokens_V | (bad == -torch.inf)), bad, logits_RV)

    program = Program(plain.schema, plain.agents, plain.max_positions, plain.vocab_size, one_bad, {})
    engine = Engine(program, EngineConfig("base_shared", kv_memory="1MB", kv_dtype=torch.float64, page_size=4))

    async def run() -> list[object]:
        with engine.trajectory([1, 2, 39]) as broken, engine.trajectory([1, 2, 3]) as whole:
            turns = (t.agenerate("plan", max_new_tokens=2, **options) for t in (broken, whole))
            found = list(await asyncio.gather(*turns, return_exceptions=True))
            assert broken.token_ids == [1, 2, 39]
            with pytest.raises(RequestError, match="logits after token 5 are NaN"):
                whole.score("act", [39, 4])
            return found

    error, turn = asyncio.run(run())
    assert isinstance(error, RequestError) and "logits after token 2 are NaN" in str(error)
    assert isinstance(turn, Turn) and len(turn.token_ids) == 2
    assert all(token != 39 for token in turn.token_ids)
    engine.check_integrity()
    assert engine.stats().pages_held == 0


def test_ttft_and_stats_add_up() -> None:
    engine = toy_engine("base_shared")
    with engine.trajectory([1, 2, 3, 4, 5]) as t:
        turns = [t.generate(name, max_new_tokens=3) for name in ("plan", "act")]
        assert all(turn.usage.ttft > 0 for turn in turns)
        total = engine.stats().tokens
        assert total.computed == sum(turn.usage.computed for turn in turns) == t.usage.computed
        assert engine.stats().turns == 2
        stats = engine.stats()
        assert stats.pages == stats.pages_free + stats.pages_held + stats.pages_cached
