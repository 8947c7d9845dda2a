"""`SharedModel`: one differentiable forward of every sharing scheme.

It runs the graph that the engine runs, rewritten by the same passes, over rows instead of cached pages. Its parameters
are the agents' A and B. Legend: N = rows, R = rows whose logits are wanted, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from lragent.compile.devices import place_together
from lragent.errors import InternalError
from lragent.loading.agent_slots import groups_of
from lragent.loading.model import LoadedModel
from lragent.loading.stages import Stages
from lragent.passes.adapters.constants import constants_of
from lragent.program.adapter_map import AdapterMap
from lragent.program.cache_schema import CacheSchema
from lragent.training.adapter_parameters import AdapterParameters
from lragent.training.lower_to_rows import (
    ROW_INPUTS,
    ROWS,
    LayerStreams,
    Observer,
    RowGraph,
    RowsInput,
    Segment,
    lower_to_rows,
)
from lragent.training.rows import Rows

if TYPE_CHECKING:
    from lragent.passes.pipeline import Transformed


class SharedModel(nn.Module):
    """A causal LM and its agents under any sharing scheme; the scheme is a property of the rows.

    `parameters()` are A and B of every agent in at least float32, and nothing else. The model's own weights are frozen
    and keep their dtype. In a forward they follow the parameters to their device; without parameters, the rows.

    Args:
        graph: a rewritten graph in split layout, not lowered; it is changed.
        schema: its cache schema.
        trainable: the agents' A and B, and the graph's constants that follow from them; None: every weight is fixed.
        fixed: modules of which an adapter has more than A and B (DoRA's magnitude, replaced rows). These stay.
        checkpointing: True recomputes each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        schema: CacheSchema,
        trainable: tuple[AdapterParameters, AdapterMap] | None = None,
        checkpointing: bool = True,
    ) -> None:
        super().__init__()
        self.agents, self.schema = schema.agents, schema
        self.checkpointing = checkpointing
        self.adapters = trainable[0] if trainable else None
        self._map = trainable[1] if trainable else AdapterMap((), ())
        self.fixed = self._map.fixed
        held = {name for name, _ in graph.named_buffers()}
        inputs = tuple(name for name in self._constants() if name in held)
        self._rows: RowGraph = lower_to_rows(graph, schema, inputs)
        self._last_use = _last_use(self._rows.layers)
        cached = {module for constant in self._map.attention for module in constant.modules}
        self._cached_a = {entry.a for entry in self._map.routed if entry.stream.module in cached}
        self._device = next((tensor.device for tensor in graph.buffers()), torch.device("cpu"))
        of_head = (entry for entry in self._map.routed if {entry.a, entry.b} & {*self._rows.head.takes})
        self._head_map = AdapterMap(tuple(of_head), ())
        unknown = set(self._rows.head.takes) - {self._rows.hidden, *ROW_INPUTS, *inputs}
        if unknown:
            raise InternalError(f"the LM head reads {', '.join(sorted(unknown))}")

    @classmethod
    def of_model(cls, loaded: LoadedModel, stages: Stages | None = None, checkpointing: bool = True) -> SharedModel:
        """Captures and rewrites a loaded model.

        Raises:
            SplitRefused: an adapter can't be routed, or K and V can't be split.
        """
        from lragent.capture.capture import capture
        from lragent.passes.pipeline import transform

        stages = stages or Stages()
        captured = stages.run("capture", lambda: capture(loaded))
        split = stages.run("rewrite split", lambda: transform(captured, "split"))
        return cls.of_program(loaded, split, checkpointing)

    @classmethod
    def of_program(cls, loaded: LoadedModel, split: Transformed, checkpointing: bool = True) -> SharedModel:
        """From a loaded model's program in split layout, whose graph is changed."""
        parameters = AdapterParameters(loaded.lora, split.schema.agents, groups_of(loaded))
        return cls(split.graph, split.schema, (parameters, split.adapter_map), checkpointing)

    def forward(self, rows: Rows) -> Tensor:
        """Logits that predict the generated tokens: float32 `[R, vocab]`, in the order of `rows.logits_rows_R`."""
        return self.logits(self.hidden(rows), rows.target_agents_R)

    def hidden(self, rows: Rows, observe: Observer | None = None) -> Tensor:
        """Last hidden states of the wanted rows, before the LM head: `[R, D]`.

        Args:
            observe: called with the streams of each attention op, in order; again when a layer is recomputed.
        """
        self._place(rows.token_ids_N.device)
        constants = self._constants()
        given = RowsInput(rows, observe)
        if rows.parts is not None and observe is None and torch.is_grad_enabled():
            given = RowsInput(rows.parts.others, before=self._streams_of_free(rows.parts.free, constants))
        values = _inputs(given) | constants
        for number, layer in enumerate(self._rows.layers):
            values.update(self._run(layer, values))
            self._drop_used(number, values)
        hidden: Tensor = values[self._rows.hidden][0]
        return hidden

    def _streams_of_free(self, rows: Rows, constants: Mapping[str, Tensor]) -> tuple[LayerStreams, ...]:
        """Streams of adapter-free rows by attention op; gradients reach the A of low-rank streams, and nothing else."""
        streams: list[LayerStreams] = []

        def observe(found: LayerStreams) -> None:
            streams.append(replace(found, key_NHDk=found.key_NHDk.detach(), value_NHDv=found.value_NHDv.detach()))

        values = _inputs(RowsInput(rows, observe))
        values |= {name: value if name in self._cached_a else value.detach() for name, value in constants.items()}
        for number, layer in enumerate(self._rows.layers[:-1]):  # the last one has no attention
            gives = layer.call(*(values[name] for name in layer.takes))
            values.update(zip(layer.gives, gives, strict=True))
            # The layer ends with attention. Where adapters are computed with the B of no agent, which is zero, values
            # depend on A without a gradient.
            values[layer.gives[-1]] = values[layer.gives[-1]].detach()
            self._drop_used(number, values)
        return tuple(streams)

    def logits(self, hidden_RD: Tensor, agent_ids_R: Tensor) -> Tensor:
        """Logits of hidden states, float32 `[R, vocab]`. If `[R, vocab]` is too large, call it for some rows at a time.

        Args:
            agent_ids_R: agent of each row, for adapters on the LM head.
        """
        self._place(hidden_RD.device)
        values = {
            self._rows.hidden: hidden_RD[None],
            "agent_ids": agent_ids_R,
            "logits_rows": torch.arange(len(agent_ids_R), device=agent_ids_R.device),
            **self._constants_of(self._head_map),
        }
        head = self._rows.head
        (logits,) = head.call(*(values[name] for name in head.takes))
        assert isinstance(logits, Tensor)
        return logits

    @property
    def holds_scores(self) -> bool:
        """True if some attention keeps its scores `[heads, n, L]` in memory."""
        return self._rows.holds_scores

    @property
    def pairs(self) -> Mapping[str, Mapping[str, tuple[nn.Parameter, nn.Parameter]]]:
        """Module FQN -> agent -> the parameters A `[r, in]` and B `[out, r]`; a shared A is one parameter."""
        return {} if self.adapters is None else self.adapters.pairs

    def adapter_weights(self, agent: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Module FQN -> A `[r, in]` and B `[out, r]` of an agent, without scaling; detached copies."""
        if self.adapters is None:
            raise InternalError("a model without parameters has no adapter weights")
        return self.adapters.of_agent(agent)

    def _drop_used(self, number: int, values: dict[str, Any]) -> None:
        """Drops the values that no layer takes after the one with this number."""
        for name in self._last_use[number]:
            values.pop(name, None)

    def _run(self, layer: Segment, values: dict[str, Any]) -> dict[str, Any]:
        takes = [values[name] for name in layer.takes]
        if self.checkpointing and torch.is_grad_enabled():
            gives = checkpoint(layer.call, *takes, use_reentrant=False)
        else:
            gives = layer.call(*takes)
        return dict(zip(layer.gives, gives, strict=True))

    def _place(self, given: torch.device) -> None:
        """Moves the frozen weights to the device of the parameters, or without parameters to that of the input."""
        device = next((parameter.device for parameter in self.parameters()), given)
        if device != self._device:
            place_together([segment.call for segment in (*self._rows.layers, self._rows.head)], device)
            self._device = device

    def _constants(self) -> dict[str, Tensor]:
        """The graph's constants that follow from the parameters, in the dtype of the model."""
        return self._constants_of(self._map)

    def _constants_of(self, some: AdapterMap) -> dict[str, Tensor]:
        if self.adapters is None:
            return {}
        modules = {entry.stream.module for entry in some.routed}.union(*(entry.modules for entry in some.attention))
        return constants_of(some, self.agents, self.adapters.adapters(modules))


def _inputs(given: RowsInput) -> dict[str, Any]:
    """The graph's inputs but its constants."""
    rows = given.rows
    return {
        "token_ids": rows.token_ids_N,
        "positions": rows.positions_N,
        "agent_ids": rows.agent_ids_N,
        "logits_rows": rows.logits_rows_R,
        ROWS: given,
    }


def _last_use(layers: tuple[Segment, ...]) -> list[list[str]]:
    """For each layer, the values that no later layer takes; the values that the last layer gives stay."""
    last: dict[str, int] = {}
    for number, layer in enumerate(layers[:-1]):
        last.update(dict.fromkeys((*layer.takes, *layer.gives), number))
    for name in layers[-1].takes:
        last[name] = len(layers) - 1
    return [[name for name, at in last.items() if at == number] for number in range(len(layers))]
