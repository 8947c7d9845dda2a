"""The reference against token-by-token dot products in float64, and against PyTorch's own attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lragent.kernels.attention_call import AttentionCall
from lragent.kernels.flash_lora_attention import reference
from tests.kernels.attention_cases import CASES, WIDE_NORM_CASES, Case, in_double


def _key(v: AttentionCall, agent: int, head: int, slot: tuple[int, int], position: int, page_size: int) -> Tensor:
    page, offset = slot
    base_HD = v.k_cache[page, :, offset]
    delta_HD = torch.zeros_like(base_HD)
    if v.lr_k is not None:
        start, rank, _, _ = v.lr_k_table[agent].tolist()
        columns = v.lr_k[start + (page * page_size + offset) * rank :][:rank]
        for c in range(rank):
            delta_HD = delta_HD + columns[c] * v.b_k[agent, :, c]

    def f(x_HD: Tensor) -> Tensor:
        x, weight = x_HD[head], v.norm_weight
        if weight is not None:
            normed = x_HD if weight.dim() == 2 else x
            x = x / math.sqrt(float((normed * normed).mean()) + v.norm_eps)
            x = x * (weight[head] if weight.dim() == 2 else weight)
        if v.rope_cos is not None:
            x = v.rope_cos[position] * x + v.rope_sin[position] * x[v.rope_partner]
        return x

    return base_HD[head] + f(delta_HD) if v.key_is_final else f(base_HD + delta_HD)


def _naive(case: Case, v: AttentionCall) -> Tensor:
    rows = []
    for s, (length, count, _) in enumerate(case.sequences):
        for i in range(count):
            row = int(v.seq_starts[s]) + i
            position, agent = length - count + i, int(v.agent_ids_T[row])
            low = max(0, position - case.window + 1) if case.window else 0
            heads = []
            for h in range(case.heads * case.group):
                kv = h // case.group
                scores, values = [], []
                for j in range(low, position + 1):
                    slot = (int(v.page_table_SM[s, j // case.page_size]), j % case.page_size)
                    score = float(v.query_THqDk[row, h] @ _key(v, agent, kv, slot, j, case.page_size)) * v.scale
                    scores.append(case.softcap * math.tanh(score / case.softcap) if case.softcap else score)
                    value = v.v_cache[slot[0], kv, slot[1]]
                    if v.lr_v is not None:
                        start, rank, _, _ = v.lr_v_table[agent].tolist()
                        columns = v.lr_v[start + (slot[0] * case.page_size + slot[1]) * rank :][:rank]
                        value = value + columns @ v.b_v[agent, kv, :rank]
                    values.append(value)
                total = sum(math.exp(x) for x in scores)
                if v.sinks_Hq is not None:
                    total += math.exp(float(v.sinks_Hq[h]))
                weighted = [math.exp(x) / total * y for x, y in zip(scores, values, strict=True)]
                heads.append(torch.stack(weighted).sum(0))
            rows.append(torch.stack(heads))
    return torch.stack(rows)


SHORT = ((9, 4, (1, 3, 3, 0)), (17, 1, 2), (18, 2, 3))


@pytest.mark.parametrize("case", CASES[:18] + WIDE_NORM_CASES, ids=lambda case: case.name)
def test_reference_is_the_definition(case: Case) -> None:
    from dataclasses import replace

    short = replace(case, sequences=SHORT)
    attention = in_double(short.build())
    torch.testing.assert_close(
        reference.flash_lora_attention(attention), _naive(short, attention), rtol=1e-11, atol=1e-11
    )


def test_plain_causal_attention_is_pytorchs() -> None:
    q, k, v = torch.randn(1, 6, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = reference.causal_attention(q, k, v, None, 8**-0.5, 0, 0.0)
    torch.testing.assert_close(found, expected.transpose(1, 2))
