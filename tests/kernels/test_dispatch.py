"""dispatch: auto chooses, an explicit name is taken or refused."""

import logging
from pathlib import Path

import pytest

from lragent.errors import CompilerMissing, RequestError
from lragent.kernels import cpp_library, triton_library
from lragent.kernels.dispatch import graphs, resolve


def test_explicit_names_are_kept() -> None:
    assert resolve("reference", "cpu") == "reference"
    assert resolve("torch", "cuda:1") == "torch"


def test_auto_gives_an_available_one() -> None:
    assert resolve(resolve("auto", "cpu"), "cpu") == resolve("auto", "cpu")


@pytest.mark.skipif(not triton_library.is_installed(), reason="triton isn't installed")
def test_triton_is_taken_on_a_gpu() -> None:
    assert resolve("auto", "cuda:0") == resolve("triton", "cuda:1") == "triton"
    assert triton_library.is_loaded()


@pytest.fixture
def _no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_library, "is_loaded", lambda: False)
    monkeypatch.setattr(triton_library, "is_installed", lambda: False)


@pytest.mark.usefixtures("_no_triton")
def test_without_triton_auto_says_what_it_takes_instead(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve("auto", "cuda") == "torch"
    assert "attention torch, which is slower: attention 'triton' needs the package triton" in caplog.text
    with pytest.raises(RequestError, match="needs the package triton"):
        resolve("triton", "cuda")


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


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(RequestError, match="attention 'magic' is not available"):
        resolve("magic", "cpu")


def test_triton_is_for_gpus() -> None:
    with pytest.raises(RequestError, match="attention 'triton' does not run on cpu"):
        resolve("triton", "cpu")


def test_cpp_is_for_the_cpu() -> None:
    with pytest.raises(RequestError, match="does not run on cuda"):
        resolve("cpp", "cuda")


def test_inductor_has_a_graph_for_each_kind_of_step() -> None:
    assert graphs("inductor") == ("inductor_decode", "inductor_prefill")
    assert graphs("torch") == ("torch",)
