"""Scripts of turns as sequences, and log-probabilities of a forward over rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lragent.training.rows import Rows
from lragent.training.shared_model import SharedModel
from lragent.training.turn_sequence import Turn, TurnSequence
from tests.models import VOCAB
from tests.oracle.sharing_oracle import Step

AGENTS = ("plan", "action", "reflect", "base")
# plan, then another writer, the same agent twice in a row, base in between, a turn right after another.
SCRIPT: tuple[Step, ...] = (
    ("append", [5, 40, 77, 12, 90, 33, 8, 61, 102, 55, 7, 19]),
    ("turn", "plan", 4, [17, 3, 99, 41]),
    ("append", [17, 23]),
    ("turn", "action", 3, [64, 64, 2]),
    ("turn", "plan", 3, [30, 8, 71]),
    ("append", [91, 14, 66]),
    ("turn", "base", 2, [12, 13]),
    ("turn", "reflect", 3, [88, 1, 45]),
    ("append", [50]),
    ("turn", "reflect", 2, [9, 10]),
    ("turn", "action", 2, [100, 6]),
)


def sequence_of(script: Sequence[Step]) -> TurnSequence:
    """A script of appended and forced tokens as one sequence."""
    tokens: list[int] = []
    turns: list[Turn] = []
    for step in script:
        if step[0] == "append":
            tokens += step[1]
        else:
            turns.append(Turn(step[1], len(tokens), len(tokens) + step[2]))
            tokens += step[3]
    return TurnSequence(tuple(tokens), tuple(turns))


def random_script(seed: int, turns: int = 6) -> list[Step]:
    """A script of forced turns with appended tokens between most of them."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def tokens(count: int) -> list[int]:
        return [number(0, VOCAB - 2) for _ in range(count)]

    script: list[Step] = [("append", tokens(number(1, 40)))]
    for _ in range(turns):
        count = number(1, 6)
        script.append(("turn", AGENTS[number(0, len(AGENTS))], count, tokens(count)))
        more = number(0, 12)
        if more > 3:
            script.append(("append", tokens(more)))
    return script


def logprobs(model: SharedModel, rows: Rows) -> list[list[float]]:
    """Log-probabilities of the generated tokens, turn by turn."""
    with torch.no_grad():
        found: Tensor = model(rows).log_softmax(-1).gather(1, rows.targets_R[:, None])[:, 0]
    return [found[rows.turns_R == turn].tolist() for turn in range(int(rows.turns_R.max()) + 1)]


def differences(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> Iterator[float]:
    for one, other in zip(left, right, strict=True):
        yield from (abs(x - y) for x, y in zip(one, other, strict=True))
