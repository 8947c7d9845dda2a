"""stages: each is announced and timed once."""

from __future__ import annotations

import pytest

from lragent.errors import InternalError
from lragent.loading.stages import Stages


def test_a_stage_is_announced_and_timed() -> None:
    announced: list[str] = []
    stages = Stages(announced.append)
    assert stages.run("load", lambda: 5) == 5
    assert announced == ["load"] and stages.seconds["load"] >= 0


def test_two_stages_of_one_name_are_refused() -> None:
    stages = Stages()
    stages.run("compile split", lambda: None)
    with pytest.raises(InternalError, match="stage 'compile split' has run already"):
        stages.run("compile split", lambda: None)
