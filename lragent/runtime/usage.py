"""What a turn, a trajectory, or an engine has computed, by kind of pass."""

from __future__ import annotations

from dataclasses import dataclass

from lragent.runtime.schemes import Kind


@dataclass
class Usage:
    """Tokens that went through the model, apart by why, and tokens that didn't have to.

    Args:
        prefill: tokens of prompts and appended pieces, and the last sampled token of the turn before, run by the
            acting agent.
        decode: sampled or forced tokens run in their own turn.
        catch_up: tokens that others wrote, run for the acting agent's own LR columns (`base_shared`).
        adapter_free: tokens run without adapter after a turn (`rebase_shared`).
        replay: tokens run again because their pages were lost to memory pressure.
        rerun: tokens run again for their logits only; nothing is kept.
        reused: tokens of the trajectory at the start of a turn that no pass but `adapter_free` ran over.
        ttft: seconds from request to first token; a sum where several turns are added up.
    """

    prefill: int = 0
    decode: int = 0
    catch_up: int = 0
    adapter_free: int = 0
    replay: int = 0
    rerun: int = 0
    reused: int = 0
    ttft: float = 0.0

    @property
    def computed(self) -> int:
        """All tokens that went through the model."""
        return self.prefill + self.decode + self.catch_up + self.adapter_free + self.replay + self.rerun

    def count(self, kind: Kind, tokens: int) -> None:
        setattr(self, kind, getattr(self, kind) + tokens)

    def add(self, other: Usage) -> None:
        for name in vars(other):
            setattr(self, name, getattr(self, name) + getattr(other, name))
