"""Builds the C++ kernels once per machine and torch version, and loads them from a cache directory.

Call `load` before a program with a C++ op runs. An AOTInductor package with such an op needs it too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from lragent.compat.torch import has_kernel
from lragent.errors import CompilerMissing
from lragent.kernels.attention_call import attention_op

ATTENTION = attention_op("flash_lora_attention_cpp", None)
_LOG = logging.getLogger(__name__)
_KERNELS = Path(__file__).parent
_HINT = 'Install g++ (or set CXX) and ninja, or use attention="torch", which needs neither.'

# at::vec chooses its vector width by these macros. torch detected which of them this processor supports.
_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
    "AVX512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c",
        "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512",
    ),
}  # fmt: skip


def is_loaded() -> bool:
    return has_kernel(ATTENTION, "CPU")


def is_obtainable() -> bool:
    """True if `load` can succeed: a built library exists, or the tools to build one do."""
    return is_loaded() or library_file().exists() or not _missing_tools()


@cache
def library_file() -> Path:
    """Path of the library for this machine, built or not; its name hashes everything the machine code depends on."""
    digest = hashlib.sha256(repr((torch.__version__, _flags())).encode())
    for file in _files():
        digest.update(f"{file.name}\0{file.read_text('utf-8')}\0".encode())
    root = os.environ.get("LRAGENT_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lragent"
    return Path(root).expanduser() / "kernels" / f"cpp-{_capability().lower()}-{digest.hexdigest()[:16]}.so"


def load() -> None:
    """Registers the C++ kernels with PyTorch. Builds them first (about half a minute) if they are not built yet.

    Raises:
        CompilerMissing: this machine has no library, and it can't be built.
    """
    if is_loaded():
        return
    file = library_file()
    if not file.exists():
        _build(file)
    if not is_loaded():
        torch.ops.load_library(file)


def _build(file: Path) -> None:
    """Builds in a private directory. A killed process then leaves no lock behind that blocks other processes."""
    if missing := _missing_tools():
        raise CompilerMissing(f"the C++ kernels can't be built: no {' and no '.join(missing)} was found", _HINT)
    from torch.utils import cpp_extension

    _LOG.info("building the C++ kernels into %s", file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        try:
            with _python_programs_on_path():
                cpp_extension.load(
                    name=file.stem,
                    sources=[str(source) for source in _files() if source.suffix == ".cpp"],
                    extra_cflags=list(_flags()),
                    extra_ldflags=["-fopenmp"],
                    extra_include_paths=[str(_KERNELS)],
                    build_directory=scratch,
                    is_python_module=False,
                )
        except RuntimeError as error:
            raise CompilerMissing(f"the C++ kernels can't be built: {error}", _HINT) from error
        os.replace(Path(scratch) / file.name, file)


def _files() -> list[Path]:
    return sorted(file for file in _KERNELS.rglob("*") if file.suffix in (".cpp", ".h"))


def _capability() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _flags() -> tuple[str, ...]:
    instructions = _INSTRUCTIONS.get(_capability(), ("-DCPU_CAPABILITY=DEFAULT",))
    # The bf16 dot product instruction. Not every processor with AVX-512 has it.
    has_bf16_dot = _capability() == "AVX512" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    bf16_dot = ("-mavx512bf16",) if has_bf16_dot else ()
    return ("-O3", "-fopenmp", *instructions, *bf16_dot)


def _missing_tools() -> list[str]:
    compiler = os.environ.get("CXX", "c++")
    missing = [] if shutil.which(compiler.split()[0]) else [f"compiler {compiler!r}"]
    return missing if shutil.which("ninja", path=_search_path()) else [*missing, "ninja"]


def _search_path() -> str:
    """PATH, then the folder of this Python: it holds ninja even if the environment is not activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


@contextmanager
def _python_programs_on_path() -> Iterator[None]:
    before = os.environ.get("PATH")
    os.environ["PATH"] = _search_path()
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before
