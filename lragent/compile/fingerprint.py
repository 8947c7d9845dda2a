"""Fingerprint of a program: everything that a compiled package depends on besides its target.

A package holds no weights, so a program with other weights of the same shapes can keep it. The fingerprint contains the
values of two kinds of constants only: those of up to eight numbers, which Inductor inlines into the code, and the
gather indices and routes of the adapters (`route_adapters`).
"""

from __future__ import annotations

import hashlib
import json

from torch import Tensor, fx

from lragent.compile.export import tensors_of
from lragent.passes.route_adapters import GATHER_INDEX, ROUTE
from lragent.program.cache_schema import CacheSchema

# Inductor inlines scalars, and one-dimensional constants up to this length.
INLINED = 8


def fingerprint(graph: fx.GraphModule, schema: CacheSchema) -> str:
    """sha256 of a rewritten program, independent of the agents' names; equal fingerprints compile to equal packages."""
    sha = hashlib.sha256(graph.code.encode())
    for line in sorted(constants(graph).items()):
        sha.update(json.dumps(line).encode())
    streams = [(layer.kv_heads, layer.k_dim, layer.v_dim) for layer in schema.base]
    low_rank = [(stream.module, stream.ranks, stream.shares_a_with) for stream in schema.low_rank]
    sha.update(json.dumps([schema.layout, len(schema.agents), streams, low_rank]).encode())
    return sha.hexdigest()


def constants(graph: fx.GraphModule) -> dict[str, str]:
    """Describes each constant: dtype, shape, the name it is tied to, and its values if packages depend on them."""
    first: dict[tuple[int, object, object], str] = {}
    described: dict[str, str] = {}
    for name, tensor in tensors_of(graph).items():
        same = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        tied = f" = {same}" if same != name and tensor.numel() > 0 else ""
        described[name] = f"{tensor.dtype} {list(tensor.shape)}{tied}{_numbers(name, tensor)}"
    return described


def _numbers(name: str, tensor: Tensor) -> str:
    inlined = tensor.dim() <= 1 and tensor.numel() <= INLINED
    if not inlined and not name.startswith((GATHER_INDEX, ROUTE)):
        return ""
    return f" {tensor.tolist()}"
