"""fingerprint: weights may change, everything that compiled code depends on may not."""

from __future__ import annotations

from lragent.capture.capture import capture
from lragent.compile.fingerprint import fingerprint
from lragent.loading.model import load_live
from lragent.passes.pipeline import transform
from tests.passes.tiny_lm import Tiny


def _print(tiny: Tiny, scale: float = 1.0) -> str:
    model = tiny.build()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= scale
    program = transform(capture(load_live(model)), "split")
    return fingerprint(program.graph, program.schema)


def test_other_weights_and_names_give_the_same() -> None:
    assert _print(Tiny(ranks={"a": 2, "b": 4})) == _print(Tiny(ranks={"c": 2, "d": 4}), scale=2)


def test_ranks_in_another_order_give_another_though_all_shapes_are_equal() -> None:
    """On queries only, so that no stream of the cache shows the ranks."""
    first, second = (Tiny(targets=("alpha",), ranks=ranks) for ranks in ({"a": 2, "b": 4}, {"a": 4, "b": 2}))
    assert _print(first) != _print(second)


def test_targets_ranks_and_a_shared_a_give_others() -> None:
    ranks = {"a": 4, "b": 4}
    forms = (
        Tiny(ranks=ranks),
        Tiny(ranks={"a": 4, "b": 3}),
        Tiny(ranks=ranks, shared_a=True),
        Tiny(ranks=ranks, targets=("beta", "gamma")),
        Tiny(ranks=ranks, targets=("alpha", "gamma"), use_dora=True),
    )
    assert len({_print(form) for form in forms}) == len(forms)
