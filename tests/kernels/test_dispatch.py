"""dispatch: auto chooses, an explicit name is taken or refused."""

import pytest

from lragent.errors import RequestError
from lragent.kernels.dispatch import resolve


def test_explicit_names_are_kept() -> None:
    assert resolve("reference", "cpu") == "reference"
    assert resolve("torch", "cuda:1") == "torch"


def test_auto_gives_an_available_one() -> None:
    assert resolve(resolve("auto", "cpu"), "cpu") == resolve("auto", "cpu")


@pytest.mark.parametrize("name", ["magic", "triton"])
def test_what_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"attention '{name}' is not available"):
        resolve(name, "cpu")
