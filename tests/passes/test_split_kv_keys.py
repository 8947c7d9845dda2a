"""split_kv: key transforms that are derived, and keys that are refused next to a near miss that splits."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from tests.passes.key_paths import (
    clipped,
    interleaved,
    norm_over_heads,
    norm_over_heads_then_rotate,
    norm_then_rotate,
    partial,
    scaled_rotation,
)
from tests.passes.stages import split_report
from tests.passes.tiny_lm import Path, keep, rms_norm, rotate


@pytest.mark.parametrize(
    ("key_path", "kind"),
    [
        (keep, "linear"),
        (rotate, "rotary"),
        (interleaved, "rotary"),
        (partial, "rotary"),
        (scaled_rotation, "rotary"),
        (rms_norm, "norm"),
        (norm_then_rotate, "norm+rotary"),
        (norm_over_heads, "wide norm"),
        (norm_over_heads_then_rotate, "wide norm+rotary"),
    ],
    ids=lambda p: p.__name__ if callable(p) else p,
)
def test_key_transforms_are_derived(key_path: Path, kind: str) -> None:
    report, state = split_report(key_path=key_path)
    assert report.misses == ()
    key, _ = next(iter(state.split.values()))
    assert key.transform.kind == kind
    assert key.transform.final == ("norm" not in kind)


def centred_norm(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    return rms_norm(x - x.mean(-1, keepdim=True), positions, module)


def head_mixing(x: Tensor, positions: Tensor, module: nn.Module) -> Tensor:
    return rotate(x + x.flip(-1), positions, module)


@pytest.mark.parametrize(
    ("refused", "reason", "splits"),
    [
        (clipped, "not linear, and not a norm of each head", keep),
        (centred_norm, "are zero for an input of ones", rms_norm),
        (head_mixing, "is not one channel of the projection", rotate),
    ],
    ids=lambda p: p.__name__ if callable(p) else None,
)
def test_refused_keys_and_their_near_miss(refused: Path, reason: str, splits: Path) -> None:
    report, _ = split_report(key_path=refused)
    assert [miss.where for miss in report.misses] == ["layer 0 key", "layer 1 key"]
    assert all(reason in miss.reason and miss.node for miss in report.misses)
    near, _ = split_report(key_path=splits)
    assert near.misses == ()
