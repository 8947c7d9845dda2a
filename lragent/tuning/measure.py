"""Agreement of agents with the teacher, teacher-forced, under a sharing scheme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.program.agent import BASE
from lragent.training.rows import Rows
from lragent.training.token_figures import TokenFigures, token_figures
from lragent.tuning.material import Material


@dataclass(frozen=True)
class Agreement:
    """Figures of one agent, or of all.

    Args:
        tokens, turns: number of scored ones.
        kl: mean KL(teacher || student) a token, in nats.
        top1: share of tokens where both have the same most likely token.
        cross_entropy: mean of the generated tokens, in nats.
        turn_accuracy: share of turns in which every token is the student's most likely one.
    """

    tokens: int
    turns: int
    kl: float
    top1: float
    cross_entropy: float
    turn_accuracy: float


def measure(material: Material, scheme: str, indices: Sequence[int], batch_tokens: int) -> dict[str, Agreement]:
    """Agreement on generated tokens by agent under a scheme; agents without a turn are left out.

    Args:
        indices: of examples; the teacher has all of them.
    """
    names = (BASE, *material.model.agents)
    tokens: list[Tensor] = []  # [R, 5]: agent id, KL, same most likely token, cross-entropy, target is most likely
    turns: list[Tensor] = []  # [turns, 2]: agent id, all targets are most likely
    for _, rows, figures in _batches(material, scheme, indices, batch_tokens):
        found_R5 = _columns(rows.target_agents_R, figures).cpu()
        tokens.append(found_R5)
        number_R = rows.turns_R.cpu().unique_consecutive(return_inverse=True)[1]
        right = torch.ones(int(number_R[-1]) + 1, dtype=torch.float64)
        right.scatter_reduce_(0, number_R, found_R5[:, 4], "amin")
        agents = torch.zeros_like(right).scatter_(0, number_R, found_R5[:, 0])
        turns.append(torch.stack([agents, right], 1))
    all_R5, all_T2 = torch.cat(tokens), torch.cat(turns)
    present = [int(agent) for agent in all_T2[:, 0].unique()]
    return {names[agent]: _agreement(all_R5, all_T2, agent) for agent in present}


@dataclass(frozen=True)
class ExampleSums:
    """Sums over the generated tokens of one example.

    Args:
        tokens: their number; kl, cross_entropy: in nats.
    """

    tokens: int
    kl: float
    cross_entropy: float


def sums_by_example(
    material: Material, scheme: str, indices: Sequence[int], batch_tokens: int
) -> dict[int, ExampleSums]:
    """Sums under a scheme, by index."""
    found: dict[int, ExampleSums] = {}
    for picked, _, figures in _batches(material, scheme, indices, batch_tokens):
        counts = [len(material.examples[index].without_appended().generated) for index in picked]
        kl_parts, cross_entropy_parts = figures.kl_R.split(counts), figures.cross_entropy_R.split(counts)
        for index, count, kl, cross_entropy in zip(picked, counts, kl_parts, cross_entropy_parts, strict=True):
            found[index] = ExampleSums(count, float(kl.double().sum()), float(cross_entropy.double().sum()))
    return found


def _batches(
    material: Material, scheme: str, indices: Sequence[int], batch_tokens: int
) -> Iterator[tuple[tuple[int, ...], Rows, TokenFigures]]:
    """Indices of examples, their rows under a scheme, and figures of the generated tokens."""
    for picked in material.packed(indices, batch_tokens):
        examples = [material.examples[index].without_appended() for index in picked]
        rows = material.rows(scheme, examples)
        with torch.no_grad():
            scored = material.scored(rows, material.hidden(rows), picked, examples)
        assert scored.teacher_RD is not None
        students_RD = [scored.student_RD]
        (figures,) = token_figures(
            material.model.logits, scored.teacher_RD, students_RD, scored.agents_R, scored.targets_R
        )
        yield picked, rows, figures


def overall(by_agent: dict[str, Agreement]) -> Agreement:
    """Figures of all agents together."""
    rows = list(by_agent.values())
    tokens, turns = sum(row.tokens for row in rows), sum(row.turns for row in rows)

    def mean(name: str, weights: str, total: int) -> float:
        return float(sum(getattr(row, name) * getattr(row, weights) for row in rows)) / total

    return Agreement(
        tokens=tokens,
        turns=turns,
        kl=mean("kl", "tokens", tokens),
        top1=mean("top1", "tokens", tokens),
        cross_entropy=mean("cross_entropy", "tokens", tokens),
        turn_accuracy=mean("turn_accuracy", "turns", turns),
    )


def _columns(agents_R: Tensor, figures: TokenFigures) -> Tensor:
    """Float64 `[R, 5]`, the columns of `measure`'s `tokens`."""
    columns = (agents_R, figures.kl_R, figures.same_R, figures.cross_entropy_R, figures.right_R)
    return torch.stack([column.double() for column in columns], 1)


def _agreement(tokens_R5: Tensor, turns_T2: Tensor, agent: int) -> Agreement:
    own = tokens_R5[tokens_R5[:, 0] == agent]
    turns = turns_T2[turns_T2[:, 0] == agent]
    _, kl, top1, cross_entropy, _ = own.mean(0).tolist()
    return Agreement(len(own), len(turns), kl, top1, cross_entropy, float(turns[:, 1].mean()))
