"""Tokens that a turn, a trajectory, or an engine has computed, by kind of forward."""

from __future__ import annotations

from dataclasses import dataclass

from lragent.runtime.schemes import Kind


@dataclass
class Usage:
    """Tokens that ran through the model, by reason, and tokens that were reused.

    Args:
        prefill: tokens of prompts, appended tokens, and the last sampled token of the previous turn, run by the writer,
            which is the acting agent, or `base` under `neutral_shared`.
        decode: sampled or forced tokens, run in their own turn by the writer.
        acting: tokens that the acting agent runs for their logits, beside the writer (`neutral_shared`); one for each
            sampled or scored token, none where `base` acts.
        catch_up: tokens of other writers, run to store the acting agent's LR values (`base_shared`).
        adapter_free: tokens run without adapter after their turn (`rebase_shared`).
        replay: tokens run again because their pages were lost to memory pressure.
        rerun: tokens run again for their logits only; the cache is not written.
        reused: tokens at the start of the trajectory that the turn did not run, except in adapter-free forwards and as
            acting rows.
        ttft: seconds from request to first token; a sum over turns.
    """

    prefill: int = 0
    decode: int = 0
    acting: int = 0
    catch_up: int = 0
    adapter_free: int = 0
    replay: int = 0
    rerun: int = 0
    reused: int = 0
    ttft: float = 0.0

    @property
    def computed(self) -> int:
        """All tokens that ran through the model."""
        first = self.prefill + self.decode + self.acting
        return first + self.catch_up + self.adapter_free + self.replay + self.rerun

    def count(self, kind: Kind, tokens: int) -> None:
        setattr(self, kind, getattr(self, kind) + tokens)

    def add(self, other: Usage) -> None:
        for name in vars(other):
            setattr(self, name, getattr(self, name) + getattr(other, name))
