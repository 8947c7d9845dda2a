"""Says which segment each node of a lowered graph is in: embedding, one segment an attention op, and the head.

A cut lies where the fewest values that depend on the tokens go across (usually one: the residual stream), and as late
as that holds, so that a segment begins where its attention op's layer does. Before the first attention op and between
two of them there is one cut. Behind the last one there is a cut where the last segment is as long as an earlier one.

What depends on no token (rotation tables, masks, routes of agents) and is wanted in several segments is computed in
the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import fx

from lragent.compile.segments.shapes import CannotCut, Form, Scalar, TensorForm
from lragent.graph.fx_tools import dependents
from lragent.kernels.implementations import GRAPHS
from lragent.program.step import STEP_INPUTS


@dataclass(frozen=True)
class Cut:
    """Segment of every node that is computed once; `copied` nodes follow from constants and are computed where used."""

    segment: Mapping[fx.Node, int]
    copied: frozenset[fx.Node]
    count: int


@dataclass(frozen=True)
class _Facts:
    """A graph's computing nodes in order, and what they depend on."""

    nodes: tuple[fx.Node, ...]
    hidden: frozenset[fx.Node]  # depend on tokens, by way of the graph or of the cache
    copied: frozenset[fx.Node]
    attention: tuple[int, ...]  # places of the attention ops


def cuts(graph: fx.GraphModule, forms: Mapping[fx.Node, Form]) -> Iterator[Cut]:
    """Ways to cut a graph, the most promising first; they differ in where the last attention op's segment ends.

    Raises:
        CannotCut: there is no attention op, something is written in place, or what goes across a cut has no fixed form.
    """
    facts = _facts(graph, forms)
    if not facts.attention:
        raise CannotCut("it has no attention op")
    crossing = _crossing(facts, forms)
    bounds = [0, *(place + 1 for place in facts.attention)]
    starts = [_latest(crossing, first, last, facts) for first, last in zip(bounds, facts.attention, strict=False)]
    lengths = dict.fromkeys(end - start for start, end in pairwise(starts))
    ends = [starts[-1] + length for length in lengths if bounds[-1] <= starts[-1] + length < len(facts.nodes)]
    ends = [end for end in ends if crossing[end] == min(crossing[start] for start in starts)]
    for end in (*ends, None):
        yield _assigned(facts, [*starts, end] if end is not None else starts)


def _facts(graph: fx.GraphModule, forms: Mapping[fx.Node, Form]) -> _Facts:
    nodes: list[fx.Node] = []
    hidden = dependents(
        graph.graph,
        lambda n: n.op == "placeholder" and (n.target == "token_ids" or n.target not in STEP_INPUTS),
        lambda n: n.op != "call_function" or isinstance(forms.get(n), Scalar),
    )
    copied: set[fx.Node] = set()
    attention: list[int] = []
    targets = {entry.target for entry in GRAPHS.values()}
    for node in graph.graph.nodes:
        form = forms.get(node)
        if node.op == "get_attr" or (isinstance(form, Scalar) and isinstance(form.size, (int, float))):
            copied.add(node)
        elif node.op == "call_function" and not isinstance(form, Scalar):
            _require_no_writes(node)
            if node not in hidden and copied.issuperset(node.all_input_nodes):
                copied.add(node)
                continue
            if node.target in targets:
                attention.append(len(nodes))
            nodes.append(node)
    return _Facts(tuple(nodes), frozenset(hidden), frozenset(copied), tuple(attention))


def _require_no_writes(node: fx.Node) -> None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for value, argument in zip(node.args, node.target._schema.arguments, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, fx.Node) and value.op != "placeholder":
            raise CannotCut(f"it writes into a value in place ({node.name})")


def _crossing(facts: _Facts, forms: Mapping[fx.Node, Form]) -> list[float]:
    """How many values that depend on tokens go across a cut before each node; infinite if one has no fixed form."""
    places = {node: place for place, node in enumerate(facts.nodes)}
    change = [0.0] * (len(facts.nodes) + 2)
    barred = [0.0] * (len(facts.nodes) + 2)
    for node in (*facts.hidden, *(n for n in facts.nodes if n not in facts.hidden)):
        if node.op == "placeholder" and node.target != "token_ids":
            continue
        uses = [places.get(user, len(facts.nodes)) for user in node.users if not isinstance(forms.get(user), Scalar)]
        first, last = places.get(node, -1) + 1, max(uses, default=-1) + 1
        if first < last:
            form = forms[node]
            tally = change if isinstance(form, TensorForm) and None not in form.shape else barred
            if tally is barred or node in facts.hidden:
                tally[first] += 1
                tally[last] -= 1
    counts, barriers = accumulate(change), accumulate(barred)
    return [count if barrier == 0 else float("inf") for count, barrier in zip(counts, barriers, strict=True)]


def _latest(crossing: list[float], first: int, last: int, facts: _Facts) -> int:
    """The last place in [first, last] with the fewest values going across."""
    fewest = min(crossing[first : last + 1])
    if fewest == float("inf"):
        raise CannotCut(f"a value with a size of its own goes across every cut before {facts.nodes[last].name}")
    return max(place for place in range(first, last + 1) if crossing[place] == fewest)


def _assigned(facts: _Facts, starts: list[int]) -> Cut:
    segment: dict[fx.Node, int] = {}
    for place, node in enumerate(facts.nodes):
        segment[node] = sum(place >= start for start in starts)
    for node in reversed(facts.nodes):
        if node in facts.hidden:
            continue
        users = {segment[user] for user in _computed_users(node, segment)}
        segment[node] = users.pop() if len(users) == 1 else 0
    return Cut(segment, facts.copied, len(starts) + 1)


def _computed_users(node: fx.Node, segment: Mapping[fx.Node, int]) -> Iterator[fx.Node]:
    """Nodes that use a value, also by way of a number that follows from it."""
    for user in node.users:
        if user in segment:
            yield user
        elif user.op == "call_function":
            yield from _computed_users(user, segment)
