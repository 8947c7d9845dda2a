"""Selects a device by name and moves weights and graphs to it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx

from lragent.compile.export import tensors_of
from lragent.errors import RequestError

Name = TypeVar("Name", bound=Hashable)
KINDS = ("cpu", "cuda")  # HIP devices are called cuda, too


def device_named(name: str) -> torch.device:
    """Returns a device of this machine; a CUDA device always has an index, as the devices of tensors do.

    Args:
        name: "cpu", "cuda" (index 0) or "cuda:N".

    Raises:
        RequestError: the name is unknown, the machine has no such device, or programs don't run on its kind.
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
                f"device {name!r} does not exist: PyTorch {torch.__version__}{built}, sees {count} GPUs", hint
            )
        return torch.device("cuda", device.index or 0)
    return device


def moved(weights: Mapping[Name, Tensor], device: torch.device) -> dict[Name, Tensor]:
    """Moves weights to a device; tied weights stay tied."""
    on_device: dict[int, Tensor] = {}
    for tensor in weights.values():
        if id(tensor) not in on_device:
            on_device[id(tensor)] = tensor.detach().to(device)
    return {name: on_device[id(tensor)] for name, tensor in weights.items()}


def placed(graph: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Moves a graph to a device, in place: its weights, and the tensors that its ops create.

    Before:                                      After:
        i = arange(T, device=cpu)                    i = arange(T, device=cuda:0)
        y = to(x, device(cpu), float32)              y = to(x, device(cuda:0), float32)

    Weights already on the device are not copied. Tied weights stay tied.
    """
    if device.type != "cpu":
        place_together((graph,), device)
    return graph


def place_together(graphs: Sequence[fx.GraphModule], device: torch.device) -> None:
    """Moves graphs to a device, as `placed` does; weights that they share stay shared."""
    weights = [tensors_of(graph) for graph in graphs]
    on_device = moved({(number, name): w for number, by in enumerate(weights) for name, w in by.items()}, device)
    for number, graph in enumerate(graphs):
        for node in graph.graph.nodes:
            node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
            node.kwargs = {name: device if isinstance(a, torch.device) else a for name, a in node.kwargs.items()}
        _put_weights(graph, {name: on_device[number, name] for name in weights[number]})
        graph.recompile()


def _put_weights(graph: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
    """Replaces a graph's weights by `weights`, by name and in place. Tied weights stay tied."""
    parameters: dict[int, torch.nn.Parameter] = {}
    for name in tensors_of(graph):
        owner_name, _, leaf = name.rpartition(".")
        owner = graph.get_submodule(owner_name)
        weight = weights[name]
        if not isinstance(getattr(owner, leaf), torch.nn.Parameter):
            # A parameter would be registered as one.
            setattr(owner, leaf, weight.detach() if isinstance(weight, torch.nn.Parameter) else weight)
            continue
        if id(weight) not in parameters:
            parameters[id(weight)] = torch.nn.Parameter(weight, requires_grad=False)
        setattr(owner, leaf, parameters[id(weight)])
