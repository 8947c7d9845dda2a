"""segments: graphs are cut at the residual stream, equal layers are one kind, the chain computes the whole graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from lragent.capture.capture import capture
from lragent.compile.segments.cut import cuts
from lragent.compile.segments.kinds import renumbered_sizes, signature
from lragent.compile.segments.plan import INPUT, VALUE, WEIGHT
from lragent.compile.segments.shapes import CannotCut, Scalar, TensorForm, forms
from lragent.loading.model import load_live
from lragent.passes.pipeline import transform
from lragent.program.step import StepKind
from tests.compile.segments.chains import chain, results, written

# Embedding, layers, head; layers that differ (windows) are kinds of their own.
KINDS = {
    ("llama", 3): [0, 1, 1, 1, 4],
    ("gemma3_text", 4): [0, 1, 2, 1, 2, 5],
    ("gpt_oss", 4): [0, 1, 2, 1, 2, 5],
    ("gpt2", 3): [0, 1, 1, 1, 4],
    ("gpt_neox", 3): [0, 1, 1, 1, 4],
}


@pytest.mark.parametrize(("kind", "layers"), KINDS)
def test_equal_layers_are_one_kind(kind: str, layers: int) -> None:
    assert chain(written(kind, layers), "torch").kinds == KINDS[kind, layers]


@pytest.mark.parametrize(("kind", "layers"), KINDS)
def test_the_chain_computes_the_whole_graph(kind: str, layers: int) -> None:
    """Bit for bit: the same ops on the same numbers, some of them copied."""
    for expected, found in zip(*results(chain(written(kind, layers), "torch"), 2, 5), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(("graph", "steps", "seqs", "tokens"), [
    ("inductor_decode", "decode", 4, 1),
    ("inductor_prefill", "prefill", 1, 7),
])  # fmt: skip
def test_graphs_for_one_kind_of_step(graph: str, steps: StepKind, seqs: int, tokens: int) -> None:
    found = chain(written("gemma3_text", 4), graph, steps)
    assert found.kinds == KINDS["gemma3_text", 4]
    for left, right in zip(*results(found, seqs, tokens), strict=True):
        assert torch.equal(left, right)


def test_fused_projections_are_cut_too() -> None:
    """Names of sizes in their place: packages serve any step. Kernels don't run here, they may not be built."""
    assert chain(written("llama", 3), "cpp").kinds == KINDS["llama", 3]


def test_a_layer_takes_the_stream_its_cache_and_what_all_layers_share() -> None:
    cut = chain(written("llama", 3), "torch")
    first, second = cut.segments[1:3]
    assert len(first.outputs) == len(second.outputs) == 1
    values = [{source for source in segment.inputs if source.startswith(VALUE)} for segment in (first, second)]
    shared = values[0] & values[1]
    assert shared <= set(cut.segments[0].outputs)
    assert len(values[0] - shared) == 1
    assert set(first.outputs) <= values[1] - shared
    caches = [{s for s in segment.inputs if s.startswith(f"{INPUT}k_base")} for segment in (first, second)]
    assert caches == [{f"{INPUT}k_base_0"}, {f"{INPUT}k_base_1"}]
    assert len([source for source in first.inputs if source.startswith(WEIGHT)]) > 7


def test_a_last_layer_of_its_own_kind() -> None:
    """Nothing equals the full-attention layer behind the sliding one: it is as long as that, which tells its end."""
    assert chain(written("gemma3_text", 2), "torch").kinds == [0, 1, 2, 3]


def test_one_layer_keeps_its_head() -> None:
    cut = chain(written("llama", 1), "torch")
    assert cut.kinds == [0, 1]
    for left, right in zip(*results(cut, 1, 3), strict=True):
        assert torch.equal(left, right)


def test_several_values_may_cross_a_cut() -> None:
    """Two streams, inputs of each layer from the token ids, and keys and values that later layers attend to again."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=96, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    cut = chain(transform(capture(load_live(model)), "dense"), "torch")
    assert len(cut.segments) >= 5
    taken = [sum(source.startswith(VALUE) for source in segment.inputs) for segment in cut.segments]
    assert max(taken) > 4
    for left, right in zip(*results(cut, 2, 5), strict=True):
        assert torch.equal(left, right)


def _graph(body: Any) -> tuple[fx.GraphModule, dict[str, Any]]:
    """A graph over token_ids and a cache tensor."""
    graph = fx.Graph()
    tokens, cache = graph.placeholder("token_ids"), graph.placeholder("k_base_0")
    graph.output(body(graph, tokens, cache))
    inputs: dict[str, Any] = {
        "token_ids": (("tokens",), torch.int64),
        "k_base_0": (("pages", 2, 32, 4), torch.float32),
    }
    return fx.GraphModule(torch.nn.Module(), graph), inputs


def test_sizes_have_the_names_of_the_step() -> None:
    aten = torch.ops.aten

    def body(graph: fx.Graph, tokens: fx.Node, cache: fx.Node) -> fx.Node:
        size = graph.call_function(aten.sym_size.int, (tokens, 0))
        heads = graph.call_function(aten.sym_size.int, (cache, 1))
        wide = graph.call_function(aten.expand.default, (tokens, [heads, size]))
        return graph.call_function(aten.reshape.default, (wide, [-1]))

    graph, inputs = _graph(body)
    found = list(forms(graph, inputs).values())
    assert found == [
        TensorForm(torch.int64, ("tokens",)),
        TensorForm(torch.float32, ("pages", 2, 32, 4)),
        Scalar("tokens"),
        Scalar(2),
        TensorForm(torch.int64, (2, "tokens")),
        TensorForm(torch.int64, (None,)),
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda g, tokens, _: g.call_function(torch.ops.aten.neg.default, (tokens,)), "the graph has no attention op"),
        (
            lambda g, tokens, _: g.call_function(
                torch.ops.aten.add_.Tensor, (g.call_function(torch.ops.aten.neg.default, (tokens,)), 1)
            ),
            "an op writes in place to an intermediate value",
        ),
        (
            lambda g, tokens, _: g.call_function(torch.ops.aten.nonzero.default, (tokens,)),
            "a shape depends on the values of a tensor",
        ),
    ],
)
def test_what_can_not_be_cut_is_said(body: Any, reason: str) -> None:
    graph, inputs = _graph(body)
    with pytest.raises(CannotCut, match=reason):
        list(cuts(graph, forms(graph, inputs)))


def test_a_signature_tells_arguments_apart() -> None:
    """Windows are plain numbers of the attention op, and nothing else differs between these two layers."""
    sliding, full = chain(written("gemma3_text", 4), "torch").segments[1:3]
    assert renumbered_sizes(sliding.shapes) == renumbered_sizes(full.shapes)
    assert sliding.dtypes == full.dtypes
    assert signature(sliding) != signature(full)
