"""The text format of a trajectory: one place that both inference and training read.

A trajectory is a sequence of *pieces*. A piece is text that is tokenised on its own, without
special tokens, and never together with its neighbours. Pieces that an agent generates begin with a space
(the header before them ends with a colon) and end with the stop string, whose token stays in the
trajectory. All other pieces are appended by the workflow.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

PLAN, ACTION, REFLECT = "plan", "action", "reflect"
ROLES = (PLAN, ACTION, REFLECT)
STOP = "\n"
HEADERS = {PLAN: "Plan:", ACTION: "Action:", REFLECT: "Reflect:"}
MAX_NEW_TOKENS = {PLAN: 72, ACTION: 24, REFLECT: 64}

SYSTEM = (
    "Three agents answer a question about people, towns, companies, schools and regions with a "
    "lookup tool.\n"
    "Plan says what the last observation showed and what is needed next.\n"
    "Action is either lookup[Name], which returns the entry of that name, or finish[Answer].\n"
    "A fact may give only the first word of a name. Such a name has no entry; look up the close "
    "name of the right kind.\n"
    "Reflect checks the final answer against the observations and ends with right or wrong.\n"
)
MALFORMED = "The action was not understood. Use lookup[Name] or finish[Answer]."

_ACTION_PATTERN = re.compile(r"^(lookup|finish)\[([^\[\]]+)\]$")


@dataclass(frozen=True)
class Piece:
    """Text tokenised on its own; `role` is the agent that generates it, None for appended text."""

    text: str
    role: str | None = None


def opening(question: str, notes: str = "") -> Piece:
    """The first piece: instructions, notes and question."""
    return Piece(f"{SYSTEM}{f'Notes:{STOP}{notes}{STOP}' if notes else ''}Question: {question}\n")


def header(role: str) -> Piece:
    """The text that the workflow appends before a turn of `role`."""
    return Piece(HEADERS[role])


def spoken(role: str, text: str) -> Piece:
    """The text that the agent generates in its turn, stop string included."""
    return Piece(f" {text}{STOP}", role)


def observation(text: str) -> Piece:
    """The text that the workflow appends after a tool call."""
    return Piece(f"Observation: {text}\n")


def parse_action(text: str) -> tuple[str, str] | None:
    """`("lookup" or "finish", argument)`; None where the text is not an action."""
    match = _ACTION_PATTERN.match(text.strip())
    if match is None or not match[2].strip():
        return None
    return match[1], match[2].strip()


def parse_verdict(text: str) -> str:
    """The last word of a reflection, "right" or "wrong"; anything else counts as "unclear"."""
    words = text.strip().rstrip(".!").split()
    return words[-1] if words and words[-1] in ("right", "wrong") else "unclear"


def token_pieces(pieces: list[Piece], tokenize: Callable[[str], list[int]]) -> tuple[list[int], list[str | None]]:
    """Token ids of a trajectory and, for each token, the role that generates it."""
    ids: list[int] = []
    roles: list[str | None] = []
    for piece in pieces:
        piece_ids = tokenize(piece.text)
        ids += piece_ids
        roles += [piece.role] * len(piece_ids)
    return ids, roles
