"""Devices: which can be used, and a graph that was captured on the CPU on another one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from lragent.compile.export import put_weights, tensors_of
from lragent.errors import RequestError

KINDS = ("cpu", "cuda")  # HIP devices are called cuda, too


def device_named(name: str) -> torch.device:
    """A device of this machine, with its index: tensors on `cuda` say that they are on `cuda:0`.

    Raises:
        RequestError: this machine has no such device, or programs can't run on its kind.
    """
    hint = "Use cpu, cuda or cuda:N."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"unknown device {name!r}", hint) from error
    if device.type not in KINDS:
        raise RequestError(f"programs don't run on device {name!r}", hint)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count <= (device.index or 0):
            built = "" if torch.backends.cuda.is_built() else ", which is built without CUDA"
            raise RequestError(
                f"device {name!r} is not there: PyTorch {torch.__version__}{built}, sees {count} GPUs", hint
            )
        return torch.device("cuda", device.index or 0)
    return device


def moved(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Weights on a device; names of one tensor still name one."""
    there: dict[int, Tensor] = {}
    for tensor in weights.values():
        if id(tensor) not in there:
            there[id(tensor)] = tensor.detach().to(device)
    return {name: there[id(tensor)] for name, tensor in weights.items()}


def placed(graph: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The graph with its weights on a device (those that are there stay), and what it creates as well; it is changed.

    Before:                                      After:
        i = arange(T, device=cpu)                    i = arange(T, device=cuda:0)
        y = to(x, device(cpu), float32)              y = to(x, device(cuda:0), float32)

    Weights that are tied stay so.
    """
    if device.type == "cpu":
        return graph
    for node in graph.graph.nodes:
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {name: device if isinstance(a, torch.device) else a for name, a in node.kwargs.items()}
    put_weights(graph, moved(tensors_of(graph), device))
    graph.recompile()
    return graph
