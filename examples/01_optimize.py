"""Two agents on a live PEFT model share one KV cache: `python examples/01_optimize.py`.

The model is tiny and random, so that this runs anywhere in seconds. A real model needs the same lines.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lragent

AGENTS = ("plan", "action")


def tiny_peft_model() -> Any:
    """A random llama of two layers with an adapter for each agent."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name=AGENTS[0])
    model.add_adapter(AGENTS[1], lora)
    return model.eval()


def main() -> None:
    """Both agents read and extend one trajectory; the second computes only the tokens that the first has not."""
    # backend="auto", the default, compiles: slower to start, faster to run. "eager" needs no C++ compiler.
    engine = lragent.optimize(tiny_peft_model(), sharing="base_lr_shared", kv_memory="16MiB", backend="eager")
    question, observation = list(range(40)), list(range(50, 60))
    with engine.trajectory(question) as t:
        for agent in (*AGENTS, *AGENTS):
            turn = t.generate(agent, max_new_tokens=6, ignore_eos=True)
            print(f"{agent:>6} wrote {turn.token_ids}, computed {turn.usage.computed}, reused {turn.usage.reused}")
            t.append(observation)
    stats = engine.stats()
    print(f"cache at peak {stats.peak_held_bytes} bytes after {stats.turns} turns of {len(engine.agents) - 1} agents")


if __name__ == "__main__":
    main()
