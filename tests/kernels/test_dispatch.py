"""dispatch: auto chooses, an explicit name is taken or refused."""

import logging
from pathlib import Path

import pytest

from lragent.errors import CompilerMissing, RequestError
from lragent.kernels import cpp_library
from lragent.kernels.dispatch import graphs, resolve


def test_explicit_names_are_kept() -> None:
    assert resolve("reference", "cpu") == "reference"
    assert resolve("torch", "cuda:1") == "torch"


def test_auto_gives_an_available_one() -> None:
    assert resolve(resolve("auto", "cpu"), "cpu") == resolve("auto", "cpu")
    assert resolve("auto", "cuda:0") == "torch"


@pytest.mark.skipif(not cpp_library.is_obtainable(), reason="no C++ compiler or no ninja")
def test_cpp_is_taken_where_it_can_be_had() -> None:
    assert resolve("auto", "cpu") == resolve("cpp", "cpu") == "cpp"
    assert cpp_library.is_loaded()


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpp_library, "is_loaded", lambda: False)
    monkeypatch.setattr(cpp_library, "library_file", lambda: tmp_path / "none.so")


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_auto_says_what_it_takes_instead(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve("auto", "cpu") == "torch"
    assert "no compiler 'no-such-compiler' was found" in caplog.text


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_cpp_is_refused() -> None:
    with pytest.raises(CompilerMissing, match="no compiler 'no-such-compiler' was found"):
        resolve("cpp", "cpu")


@pytest.mark.parametrize("name", ["magic", "triton"])
def test_what_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"attention '{name}' is not available"):
        resolve(name, "cpu")


def test_cpp_is_for_the_cpu() -> None:
    with pytest.raises(RequestError, match="does not run on cuda"):
        resolve("cpp", "cuda")


def test_inductor_has_a_graph_for_each_kind_of_step() -> None:
    assert graphs("inductor") == ("inductor_decode", "inductor_prefill")
    assert graphs("torch") == ("torch",)
