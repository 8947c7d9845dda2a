"""A path that begins with `~` is in a home directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from lragent.errors import RequestError
from lragent.files.user_path import user_path


def test_a_tilde_at_the_start_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert user_path("~/a") == user_path(Path("~/a")) == Path("/home/ada/a")
    assert user_path("a/~/b~") == Path("a/~/b~")


def test_an_unknown_user_is_named() -> None:
    with pytest.raises(RequestError, match=r"^~nobody-like-that/x: the home directory is unknown"):
        user_path("~nobody-like-that/x")
