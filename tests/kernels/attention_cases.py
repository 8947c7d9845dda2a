"""Random attention calls over a paged cache: every feature of the op, odd sizes, pages out of order, NaN elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lragent.kernels.attention_call import AttentionCall
from lragent.kernels.flash_lora_attention import reference
from lragent.program.cache_schema import LowRankStream

Kernel = Callable[[AttentionCall], Tensor]


@dataclass(frozen=True)
class Case:
    """One call; `sequences` are (context length, query tokens, agent ids of the query tokens or one for all)."""

    name: str
    sequences: tuple[tuple[int, int, int | tuple[int, ...]], ...] = ((17, 17, 1), (33, 1, 2), (1, 1, 0), (40, 3, 3))
    page_size: int = 16
    heads: int = 2
    group: int = 3
    k_dim: int = 8
    v_dim: int = 8
    ranks: tuple[int, ...] = (4, 0, 6)
    columns: str = "per_agent"
    group_of: tuple[int, ...] = (0, 1, 2)
    adapted_k: bool = True
    adapted_v: bool = True
    rope: str = "half"
    norm: bool = False
    wide_norm: bool = False
    final: bool = True
    sinks: bool = False
    window: int = 0
    softcap: float = 0.0
    cache_dtype: torch.dtype = torch.float32
    seed: int = field(default=0)

    def build(self, dtype: torch.dtype = torch.float32) -> AttentionCall:
        """A call; numbers are the same for every dtype, up to its rounding of float32 values."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        contexts = [length for length, _, _ in self.sequences]
        counts = [-(-length // self.page_size) for length in contexts]
        pages = sum(counts) + 4
        order = (torch.randperm(pages - 1, generator=generator) + 1).tolist()
        table = torch.zeros(len(contexts), max(counts) + 1, dtype=torch.int64)
        written = torch.zeros(pages, self.page_size, dtype=torch.bool)
        written[0] = True
        for s, (length, count) in enumerate(zip(contexts, counts, strict=True)):
            for m in range(count):
                page = order.pop()
                table[s, m] = page
                written[page, : min(self.page_size, length - m * self.page_size)] = True

        def poisoned(tensor: Tensor, rows_PD: Tensor) -> Tensor:
            return torch.where(rows_PD, tensor, torch.nan).to(self.cache_dtype)

        agents: list[int] = []
        for _, rows, agent in self.sequences:
            agents += [agent] * rows if isinstance(agent, int) else list(agent)
        starts = torch.tensor([0, *(rows for _, rows, _ in self.sequences)]).cumsum(0)
        values: dict[str, Any] = dict.fromkeys(entry.name for entry in fields(AttentionCall))
        by_head = written[:, None, :, None]
        values |= {
            "query_THqDk": random(len(agents), self.heads * self.group, self.k_dim).to(dtype),
            "k_cache": poisoned(random(pages, self.heads, self.page_size, self.k_dim), by_head),
            "v_cache": poisoned(random(pages, self.heads, self.page_size, self.v_dim), by_head),
            "agent_ids_T": torch.tensor(agents),
            "seq_starts": starts,
            "context_lens_S": torch.tensor(contexts),
            "page_table_SM": table,
            "norm_eps": 1e-5,
            "key_is_final": self.final,
            "scale": self.k_dim**-0.5,
            "window": self.window,
            "softcap": self.softcap,
        }
        stream = LowRankStream("m", self.ranks, self.group_of)
        for side, adapted, dim in (("k", self.adapted_k, self.k_dim), ("v", self.adapted_v, self.v_dim)):
            if not adapted:
                continue
            blocks = [
                poisoned(random(pages, self.page_size, self.ranks[a]), written[:, :, None]).reshape(-1)
                for a in stream.block_owners(self.columns)  # type: ignore[arg-type]
            ]
            up = random(len(self.ranks) + 1, self.heads, max(self.ranks), dim)
            for agent, rank in enumerate((0, *self.ranks)):
                up[agent, :, rank:] = 0
            values[f"lr_{side}"] = torch.cat(blocks)
            values[f"lr_{side}_table"] = stream.lr_directory(self.columns, pages, self.page_size)  # type: ignore[arg-type]
            values[f"b_{side}"] = up.to(dtype)
        if self.rope:
            values |= self._rotation(max(contexts), dtype)
        if self.norm:
            values["norm_weight"] = (random(self.k_dim) + 1).to(dtype)
        if self.wide_norm:
            values["norm_weight"] = (random(self.heads, self.k_dim) + 1).to(dtype)
        if self.sinks:
            values["sinks_Hq"] = random(self.heads * self.group).to(dtype)
        return AttentionCall(**values)

    def _rotation(self, positions: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Half layout, interleaved layout, or half layout over the first half of the channels."""
        dim = self.k_dim if self.rope != "partial" else self.k_dim // 2
        angles = torch.arange(positions)[:, None] * 0.7 ** torch.arange(dim // 2)
        cos, sin = torch.ones(positions, self.k_dim), torch.zeros(positions, self.k_dim)
        partner = torch.arange(self.k_dim)
        if self.rope == "interleaved":
            first, second = torch.arange(0, dim, 2), torch.arange(1, dim, 2)
        else:
            first, second = torch.arange(dim // 2), torch.arange(dim // 2, dim)
        cos[:, first], cos[:, second] = angles.cos(), angles.cos()
        sin[:, first], sin[:, second] = -angles.sin(), angles.sin()
        partner[first], partner[second] = second, first
        return {"rope_cos": cos.to(dtype), "rope_sin": sin.to(dtype), "rope_partner": partner}


CASES = (
    Case("plain"),
    Case("no adapters", adapted_k=False, adapted_v=False, rope=""),
    Case("value only", adapted_k=False, rope=""),
    Case("key only", adapted_v=False),
    Case("identity key", rope=""),
    Case("interleaved", rope="interleaved"),
    Case("partial", rope="partial"),
    Case("norm", norm=True, final=False),
    Case("norm without rotation", norm=True, final=False, rope=""),
    Case("norm without key adapter columns", norm=True, final=False, ranks=(0, 0, 3)),
    Case("window", window=5),
    Case("softcap", softcap=3.0),
    Case("sinks", sinks=True),
    Case("everything", norm=True, final=False, window=7, softcap=4.0, sinks=True),
    Case("one head a group", group=1, heads=3),
    Case("seven heads a group", group=7, heads=1),
    Case("other value dim", v_dim=12),
    Case("distinct columns", columns="distinct", ranks=(4, 4, 4), group_of=(0, 0, 2)),
    Case("mixed agents", sequences=((40, 20, (1,) * 7 + (3,) * 6 + (1,) * 7), (5, 5, (0, 1, 2, 3, 1)))),
    Case("page borders", sequences=((15, 15, 1), (16, 16, 1), (17, 1, 3), (16, 1, 3), (100, 2, 1))),
    Case("large pages", page_size=32, sequences=((100, 1, 1), (64, 64, 3), (31, 1, 1))),
    Case("many decodes", sequences=tuple((length, 1, length % 4) for length in (1, 3, 16, 17, 90, 33, 34, 47))),
)

# One norm over all heads: `reference` and `torch` only (see lragent/kernels/implementations.py).
WIDE_NORM_CASES = (
    Case("norm over all heads", wide_norm=True, final=False),
    Case("norm over all heads without rotation", wide_norm=True, final=False, rope="", window=6),
)


def rounded(case: Case, cache_dtype: torch.dtype) -> Case:
    """The same call over a cache of another dtype."""
    return replace(case, cache_dtype=cache_dtype)


def tensors_of(call: AttentionCall) -> dict[str, Tensor]:
    """The call's tensors by field name."""
    values = {entry.name: getattr(call, entry.name) for entry in fields(call)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def changed(call: AttentionCall, change: Callable[[Tensor], Tensor]) -> AttentionCall:
    """The call with every tensor replaced."""
    tensors: dict[str, Any] = {name: change(tensor) for name, tensor in tensors_of(call).items()}
    return replace(call, **tensors)


def in_double(call: AttentionCall) -> AttentionCall:
    """The same numbers in float64."""
    return changed(call, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def kernel_of(op: Callable[..., Any]) -> Kernel:
    """An op as a function of a call."""

    def run(call: AttentionCall) -> Tensor:
        result: Tensor = op(*call.arguments())
        return result

    return run


def assert_as_exact_as_reference(kernel: Kernel, call: AttentionCall) -> None:
    """The error to float64 is at most twice that of the reference in the same dtype, plus one rounding."""
    exact = reference.flash_lora_attention(in_double(call))
    plain = reference.flash_lora_attention(call)
    found = kernel(call)
    assert found.dtype == call.query_THqDk.dtype and found.shape == exact.shape
    own = float((plain.double() - exact).abs().max())
    rounding = torch.finfo(found.dtype).eps * float(exact.abs().max())
    assert float((found.double() - exact).abs().max()) <= 2 * own + rounding


def assert_as_exact_as_half_precision(kernel: Kernel, call: AttentionCall) -> None:
    """The error to float64 is at most twice that of the reference computed in the query's dtype, of half precision."""
    exact = reference.flash_lora_attention(in_double(call))
    found = kernel(call)
    with mock.patch.object(reference, "compute_dtype", lambda dtype: dtype):
        plain = reference.flash_lora_attention(call)
    assert plain.dtype == found.dtype == call.query_THqDk.dtype
    own, error = (float((x.double() - exact).abs().max()) for x in (plain, found))
    assert error <= 2 * own
