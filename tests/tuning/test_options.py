"""Defaults that depend on model and scheme, and refusals."""

from __future__ import annotations

import pytest

from lragent.errors import RequestError
from lragent.tuning.options import APPENDED_KL, LEARNING_RATE, WIDTH, TuneOptions


def test_the_learning_rate_falls_with_the_square_root_of_the_hidden_size() -> None:
    options = TuneOptions()
    assert options.peak_rate(WIDTH) == LEARNING_RATE
    assert options.peak_rate(4 * WIDTH) == pytest.approx(LEARNING_RATE / 2)
    assert TuneOptions(learning_rate=0.5).peak_rate(64) == 0.5


def test_appended_tokens_count_but_under_neutral_shared() -> None:
    options = TuneOptions()
    assert options.appended_weight("base_lr_shared") == APPENDED_KL and options.appended_weight("neutral_shared") == 0
    assert TuneOptions(appended_kl=0.4).appended_weight("neutral_shared") == 0.4


def test_names_of_modules_given_as_one_text_are_refused() -> None:
    with pytest.raises(RequestError, match="add_modules is the text 'all-linear'"):
        TuneOptions(add_modules="all-linear")  # type: ignore[arg-type]
