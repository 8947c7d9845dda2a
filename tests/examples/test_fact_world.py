"""The fact world: the generator, the lookup tool, the text format and the workflow.

No model is needed. A scripted agent stands in for the language model, and a tokenizer that splits
words, spaces and punctuation stands in for the real one.
"""

import asyncio
import json
import random
import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples.fact_world import format as fmt
from examples.fact_world import world as world_module
from examples.fact_world.format import ACTION, PLAN, REFLECT, token_pieces
from examples.fact_world.gold import gold_trajectory, reflection
from examples.fact_world.training_data import collate, example_for
from examples.fact_world.workflow import MAX_ROUNDS, workflow
from examples.fact_world.world import DEFAULT_SEED, World, build_world, make_tasks, world_of

TASKS = make_tasks("test", 80)
ADAPTERS = Path(fmt.__file__).parent / "adapters"


class WordTokenizer:
    """Gives every word (with its leading space) and every other character its own id."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._words: list[str] = []

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in re.findall(r" ?\w+|\W", text):
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
            ids.append(self._ids[word])
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self._words[index] for index in ids)


@dataclass
class ScriptedTurn:
    text: str
    finish_reason: str = "stop"


@dataclass
class ScriptedTrajectory:
    """Plays back prepared turns and records the pieces of the trajectory."""

    script: dict[str, list[str]]
    finish_reason: str = "stop"
    pieces: list[fmt.Piece] = field(default_factory=list)

    def append(self, text: str, parse_special: bool = True) -> None:
        self.pieces.append(fmt.Piece(text))

    async def agenerate(self, agent: str, *, max_new_tokens: int, stop: list[str], temperature: float) -> ScriptedTurn:
        assert max_new_tokens > 0 and temperature == 0.0
        turns = self.script[agent]
        text = turns.pop(0) if len(turns) > 1 else turns[0]
        ending = stop[0] if self.finish_reason == "stop" else ""
        self.pieces.append(fmt.Piece(text + ending, agent))
        return ScriptedTurn(text, self.finish_reason)


def gold_script(task: dict[str, Any]) -> dict[str, list[str]]:
    """What each agent says in the gold trajectory, without the stop string."""
    gold = gold_trajectory(task)
    script: dict[str, list[str]] = {PLAN: [], ACTION: []}
    for piece in gold.pieces:
        if piece.role is not None:
            script[piece.role].append(piece.text.removesuffix(fmt.STOP))
    noun, value = gold.facts[-1].relation.noun, gold.facts[-1].value
    script[REFLECT] = [" " + reflection(noun, gold.last_entity.name, value, value)]
    return script


def run(task: dict[str, Any], trajectory: ScriptedTrajectory) -> dict[str, Any]:
    return asyncio.run(workflow(task, trajectory))


def test_the_same_seed_gives_the_same_world_and_tasks() -> None:
    first, second = World(5, "test"), World(5, "test")
    assert first.entities == second.entities
    assert list(islice(first.tasks(3), 50)) == list(islice(second.tasks(3), 50))


def test_other_seeds_give_other_worlds_and_tasks() -> None:
    assert World(5, "test").entities != World(6, "test").entities
    assert make_tasks("test", 20, seed=0) != make_tasks("test", 20, seed=1)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        World(5, "dev")


def test_no_test_entity_occurs_in_a_training_entry() -> None:
    train, test = build_world(DEFAULT_SEED, "train"), build_world(DEFAULT_SEED, "test")
    assert not set(train.entities) & set(test.entities)
    training_text = " ".join(train.lookup(name) for name in train.entities)
    assert not [name for name in test.entities if name in training_text]


def test_thousands_of_distinct_tasks_are_json_and_have_two_or_three_hops() -> None:
    tasks = make_tasks("train", 3000)
    assert len({task["question"].split(" the ", 1)[1] for task in tasks}) > 2900
    assert len({task["id"] for task in tasks}) == 3000
    assert {task["hops"] for task in tasks} == {2, 3}
    assert json.loads(json.dumps(tasks)) == tasks


def test_lookup_of_an_unknown_name_lists_close_names() -> None:
    world = build_world(DEFAULT_SEED, "test")
    town = world.by_kind["town"][0]
    short = world.lookup(town.split()[0])
    assert short.startswith(f"There is no entry for {town.split()[0]}.")
    assert f"{town} (town)" in short
    assert "Close names: none." in world.lookup("Xyzzy Qwrtp")
    person = world.by_kind["person"][0]
    assert f"{person} (person)" in world.lookup(person + "e")
    assert world.lookup(f" {person} ") == world.lookup(person)
    assert "no entry" in world.lookup(" ")


def test_a_shortened_name_belongs_to_one_entity_of_its_kind() -> None:
    world = build_world(DEFAULT_SEED, "test")
    facts = [fact for entity in world.entities.values() for fact in entity.facts.values()]
    shortened = [fact for fact in facts if fact.shortened]
    assert shortened
    for fact in shortened:
        close = world.close_names(fact.mention)
        kinds = [world.entities[name].kind for name in close]
        assert fact.value in close
        assert kinds.count(fact.relation.target) == 1


def test_every_answer_is_reached_by_lookups() -> None:
    """Follows the chain with nothing but the entries' own sentences."""
    for task in TASKS:
        world = world_of(task)
        here = task["start"]
        for noun in task["relations"]:
            fact = world.entities[here].facts[noun]
            assert fact.mention in world.lookup(here)
            here = fact.value
        assert here == task["answer"]


def test_gold_agents_answer_every_task() -> None:
    for task in TASKS:
        result = run(task, ScriptedTrajectory(gold_script(task)))
        assert result["answer"] == task["answer"]
        assert result["exact_match"] and result["verdict"] == "right" and result["verdict_correct"]
        assert task["hops"] < result["steps"] <= MAX_ROUNDS


def test_some_tasks_need_a_second_lookup_for_a_shortened_name() -> None:
    texts = ["".join(piece.text for piece in gold_trajectory(task).pieces) for task in TASKS]
    assert 0.1 < sum("no entry for" in text for text in texts) / len(texts) < 0.5


def test_training_sees_the_tokens_that_inference_produces() -> None:
    tokenizer = WordTokenizer()
    for task in TASKS[:50]:
        gold = gold_trajectory(task)
        trajectory = ScriptedTrajectory(gold_script(task))
        run(task, trajectory)
        played = trajectory.pieces[: len(gold.pieces)]
        assert played == gold.pieces
        ids, roles = token_pieces(gold.pieces, tokenizer.encode)
        assert (ids, roles) == token_pieces(played, tokenizer.encode)
        spoken = [token for token, role in zip(ids, roles, strict=True) if role == ACTION]
        assert tokenizer.decode(spoken) == "".join(piece.text for piece in gold.pieces if piece.role == ACTION)


def test_spoken_pieces_begin_with_a_space_and_end_with_the_stop_string() -> None:
    piece = fmt.spoken(PLAN, "Look up Tom Stone.")
    assert piece.text == " Look up Tom Stone.\n" and piece.role == PLAN
    assert not fmt.header(PLAN).text.endswith(" ")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (" lookup[Stone Falls]", ("lookup", "Stone Falls")),
        ("finish[1969]\n", ("finish", "1969")),
        ("lookup[]", None),
        ("lookup[ ]", None),
        ("lookup[Stone Falls", None),
        ("search[Stone Falls]", None),
        ("lookup[a] lookup[b]", None),
        ("", None),
    ],
)
def test_parse_action(text: str, parsed: tuple[str, str] | None) -> None:
    assert fmt.parse_action(text) == parsed


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (" The answer 1969 is right", "right"),
        ("The answer 1969 is wrong.", "wrong"),
        ("no idea", "unclear"),
        ("", "unclear"),
    ],
)
def test_parse_verdict(text: str, verdict: str) -> None:
    assert fmt.parse_verdict(text) == verdict


def test_malformed_actions_become_observations_and_end_as_wrong() -> None:
    task = TASKS[0]
    trajectory = ScriptedTrajectory({PLAN: [" ?"], ACTION: [" look up"], REFLECT: [" hm"]})
    result = run(task, trajectory)
    assert result == {
        "answer": "",
        "exact_match": False,
        "verdict": "unclear",
        "verdict_correct": True,
        "steps": MAX_ROUNDS,
    }
    assert fmt.observation(fmt.MALFORMED) in trajectory.pieces


def test_a_turn_cut_by_length_gets_its_line_closed() -> None:
    script = {PLAN: [" so"], ACTION: [" finish[Nobody]"], REFLECT: [" The answer is wrong"]}
    trajectory = ScriptedTrajectory(script, finish_reason="length")
    result = run(TASKS[0], trajectory)
    assert result["steps"] == 1 and result["verdict"] == "wrong" and result["verdict_correct"]
    text = "".join(piece.text for piece in trajectory.pieces)
    assert text.endswith("Plan: so\nAction: finish[Nobody]\nReflect: The answer is wrong\n")


@pytest.mark.parametrize("role", fmt.ROLES)
@pytest.mark.parametrize("sentences", [3, None])
def test_training_examples_label_only_their_role(role: str, sentences: int | None) -> None:
    tokenizer = WordTokenizer()
    for task in TASKS[:20]:
        example = example_for(task, role, tokenizer.encode, random.Random(0), sentences)
        labels = [token for token, label in zip(example.ids, example.is_label, strict=True) if label]
        text = tokenizer.decode(labels)
        assert ("Steps:" in text) == (role == PLAN)
        assert ("[" in text) == (role == ACTION)
        assert ("is wrong" in text) == (role == REFLECT)


def test_a_branch_reads_the_trunk_before_it_and_itself_only() -> None:
    tokenizer = WordTokenizer()
    example = next(
        found
        for task in TASKS
        if max((found := example_for(task, REFLECT, tokenizer.encode, random.Random(0), 3)).branch) == 3
    )
    mask = example.mask()
    for number in (1, 2, 3):
        last = max(index for index, branch in enumerate(example.branch) if branch == number)
        read = mask[last].nonzero()[:, 0].tolist()
        assert {example.branch[index] for index in read} == {0, number}
        assert [example.positions[index] for index in read] == list(range(len(read)))
    packed = collate([example])
    assert packed["attention_mask"] is not None
    assert torch.equal(packed["attention_mask"][0, 0], mask)


def test_command_line_writes_tasks(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tasks.jsonl"
    world_module.main(["--split", "test", "--n", "7", "--out", str(out)])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written == make_tasks("test", 7)
    assert "wrote 7 test tasks" in capsys.readouterr().out


def test_the_committed_adapters_share_one_a_bit_for_bit() -> None:
    weights = {role: load_file(ADAPTERS / role / "adapter_model.safetensors") for role in fmt.ROLES}
    for name, plan in weights[PLAN].items():
        assert plan.dtype == torch.bfloat16
        for role in (ACTION, REFLECT):
            assert torch.equal(plan, weights[role][name]) == ("lora_A" in name), name


@pytest.mark.parametrize("role", fmt.ROLES)
def test_the_committed_adapters_name_the_public_base_model(role: str) -> None:
    config = json.loads((ADAPTERS / role / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.0)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["task_type"] == "CAUSAL_LM"
