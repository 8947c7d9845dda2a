"""A trajectory on plain PEFT and transformers, with one full KV cache per adapter.

This is what `non_shared` has to equal: every agent processes every token of the trajectory with its
own adapter. Only the two methods that the workflow needs exist.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


@dataclass
class PeftTurn:
    """One generated turn."""

    text: str
    token_ids: list[int]
    finish_reason: str


class PeftAgents:
    """The base model with its adapters and tokenizer."""

    def __init__(self, model_dir: Path, adapters: dict[str, Path]) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, trust_remote_code=False)
        names = list(adapters)
        self.model = PeftModel.from_pretrained(base, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(adapters[name], adapter_name=name)
        self.model.eval()
        self.processed_tokens = 0


class PeftTrajectory:
    """A growing token sequence and, for each agent, the cache of the tokens it has read so far."""

    def __init__(self, agents: PeftAgents) -> None:
        self._agents = agents
        self.token_ids: list[int] = []
        self.pieces: list[tuple[str | None, str]] = []
        self._caches: dict[str, DynamicCache] = {}

    def append(self, text: str, parse_special: bool = True) -> None:
        """Appends text, tokenised on its own; with `parse_special=False`, text of special tokens stays text."""
        tokenized = self._agents.tokenizer(text, add_special_tokens=False, split_special_tokens=not parse_special)
        self.token_ids += tokenized["input_ids"]
        self.pieces.append((None, text))

    async def agenerate(
        self,
        agent: str,
        *,
        max_new_tokens: int,
        stop: list[str],
        temperature: float = 0.0,
    ) -> PeftTurn:
        """Greedy decoding until a stop string, the end token or `max_new_tokens`."""
        if temperature != 0.0:
            raise ValueError("only greedy decoding is implemented here")
        tokenizer = self._agents.tokenizer
        cache = self._caches.setdefault(agent, DynamicCache())
        self._agents.model.set_adapter(agent)
        new_ids: list[int] = []
        finish_reason = "length"
        text = ""
        while len(new_ids) < max_new_tokens:
            new_ids.append(self._next_token(cache))
            self.token_ids.append(new_ids[-1])
            text = tokenizer.decode(new_ids, skip_special_tokens=True)
            cuts = [text.index(string) for string in stop if string in text]
            if cuts or new_ids[-1] == tokenizer.eos_token_id:
                text = text[: min(cuts)] if cuts else text
                finish_reason = "stop"
                break
        self.pieces.append((agent, tokenizer.decode(new_ids)))
        return PeftTurn(text, new_ids, finish_reason)

    @torch.no_grad()
    def _next_token(self, cache: DynamicCache) -> int:
        """Processes the tokens that this agent has not read yet and takes the most likely next token."""
        unread = self.token_ids[cache.get_seq_length() :]
        self._agents.processed_tokens += len(unread)
        logits = self._agents.model(
            input_ids=torch.tensor([unread]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return int(logits[0, -1].argmax())
