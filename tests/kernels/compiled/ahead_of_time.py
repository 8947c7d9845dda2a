"""Compiles a kernel for a GPU that isn't there, and reads off the machine code what it takes.

All tools come with Triton: ptxas and the disassembler for NVIDIA, LLVM for AMD.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Target -> what Triton calls it, and bytes of shared memory that one program may have.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}


@dataclass(frozen=True)
class Resources:
    """Registers a thread, spills, bytes of shared memory, tensor-core instructions, 128-bit loads."""

    registers: int
    spilled: int
    shared: int
    products: int
    wide_loads: int


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: str, **options: int) -> Resources:
    """Compiles as a launch would: pointers are aligned to 16 bytes; `types` of arguments that aren't i32."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton_compile(source, target=TARGETS[target][0], options=options)
    return _of_amd(binary) if target == "gfx942" else _of_nvidia(binary)


def _of_amd(binary: Any) -> Resources:
    text = binary.asm["amdgcn"]

    def fact(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    return Resources(
        registers=fact("vgpr_count"),
        spilled=fact("vgpr_spill_count") + fact("private_segment_fixed_size"),
        shared=binary.metadata.shared,
        products=len(re.findall("v_mfma_", text)),
        wide_loads=len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
    )


def _of_nvidia(binary: Any) -> Resources:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(file))
    return Resources(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spilled=int(re.findall(r"STACK:(\d+)", usage)[0]) + len(re.findall(r"\bSTL\b", code)),
        shared=binary.metadata.shared,
        products=len(re.findall(r"\bHG?MMA\.", code)),
        wide_loads=len(re.findall(r"LDG(?:STS)?\.E\S*\.128", code)),
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
