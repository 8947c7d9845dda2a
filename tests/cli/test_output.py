"""stages: libraries are quiet inside the block and as before after it."""

import warnings

import pytest
from transformers.utils import logging

from lragent_cli.output import stages


@pytest.mark.parametrize("drawn", [True, False])
def test_progress_bars_and_warnings_are_as_before_afterwards(drawn: bool) -> None:
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if drawn else logging.disable_progress_bar)()
        filters = list(warnings.filters)
        with pytest.raises(KeyError), stages("working") as show:
            show("one stage")
            assert not logging.is_progress_bar_enabled() and warnings.filters != filters
            raise KeyError
        assert logging.is_progress_bar_enabled() == drawn
        assert list(warnings.filters) == filters
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
