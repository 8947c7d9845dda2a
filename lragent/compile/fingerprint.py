"""What a compiled package depends on besides its target: the program's code and the form of its constants.

A package holds no weights, so a program whose weights changed may keep its package. Exceptions are constants of up to
eight numbers, which Inductor writes into the code, and those that say whose columns are where (`route_adapters`).
"""

from __future__ import annotations

import hashlib
import json

from torch import Tensor, fx

from lragent.compile.export import tensors_of
from lragent.passes.route_adapters import COLUMNS, ROUTE
from lragent.program.cache_schema import CacheSchema

# Inductor inlines constants without axes, and those of one axis up to this length.
INLINED = 8


def fingerprint(graph: fx.GraphModule, schema: CacheSchema) -> str:
    """sha256 of a rewritten program, whoever its agents are; equal fingerprints compile to equal packages."""
    sha = hashlib.sha256(graph.code.encode())
    for line in sorted(constants(graph).items()):
        sha.update(json.dumps(line).encode())
    streams = [(layer.kv_heads, layer.k_dim, layer.v_dim) for layer in schema.base]
    columns = [(stream.module, stream.ranks, stream.shares_a_with) for stream in schema.low_rank]
    sha.update(json.dumps([schema.layout, len(schema.agents), streams, columns]).encode())
    return sha.hexdigest()


def constants(graph: fx.GraphModule) -> dict[str, str]:
    """Name of each constant -> dtype, shape, what it is another name of, and its numbers where code holds them."""
    first: dict[tuple[int, object, object], str] = {}
    described: dict[str, str] = {}
    for name, tensor in tensors_of(graph).items():
        same = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        tied = f" = {same}" if same != name and tensor.numel() > 0 else ""
        described[name] = f"{tensor.dtype} {list(tensor.shape)}{tied}{_numbers(name, tensor)}"
    return described


def _numbers(name: str, tensor: Tensor) -> str:
    inlined = tensor.dim() <= 1 and tensor.numel() <= INLINED
    if not inlined and not name.startswith((COLUMNS, ROUTE)):
        return ""
    return f" {tensor.tolist()}"
