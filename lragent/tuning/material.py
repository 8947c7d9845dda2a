"""All that losses and reports are computed from: model, examples, and the teacher's hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.training.rows import Rows
from lragent.training.shared_model import SharedModel
from lragent.tuning.batch_rows import rows_of_examples
from lragent.tuning.batches import pack
from lragent.tuning.examples import Example
from lragent.tuning.loss import Scored

# Names, in `torch.cpu.get_capabilities`, of instructions that multiply bfloat16 numbers.
BFLOAT16_ARITHMETIC = ("amx_bf16", "avx512_bf16", "bf16")


@dataclass(frozen=True)
class Material:
    """Contents of a round.

    Args:
        teacher: by index of an example, the teacher's last hidden states `[R, D]` of its tokens in the loss, appended
            ones included, in memory of the CPU. Examples that nothing is compared on are missing.
        bfloat16: True multiplies in bfloat16 though weights are float32 (autocast). Logits are float32 in any case.
    """

    model: SharedModel
    vocab_size: int
    examples: tuple[Example, ...]
    teacher: Mapping[int, Tensor]
    bfloat16: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def rows(self, scheme: str, examples: Sequence[Example]) -> Rows:
        """Rows of examples on the model's device."""
        return rows_of_examples(scheme, examples, self.model.agents).to(self.device)

    def hidden(self, rows: Rows) -> Tensor:
        """Last hidden states of the tokens in the loss: `[R, D]`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            hidden_RD = self.model.hidden(rows)
        return hidden_RD.float() if self.bfloat16 else hidden_RD

    def scored(self, rows: Rows, student_RD: Tensor, indices: Sequence[int], examples: Sequence[Example]) -> Scored:
        """Hidden states of rows beside the teacher's, if it has those of all examples.

        Args:
            examples: those of the rows, as they are or without appended tokens in the loss; indices: theirs.
        """
        teacher = None
        if all(index in self.teacher for index in indices):
            pairs = zip(indices, examples, strict=True)
            teacher = torch.cat([self.teacher_of(index, example) for index, example in pairs]).to(student_RD)
        return Scored(student_RD, teacher, rows.target_agents_R, rows.targets_R)

    def teacher_of(self, index: int, example: Example) -> Tensor:
        """The teacher's states `[R, D]` of an example, as it is or without appended tokens in the loss."""
        whole = self.examples[index]
        if example.appended_kl == whole.appended_kl:
            return self.teacher[index]
        return self.teacher[index][torch.tensor(whole.generated)]

    def packed(self, indices: Sequence[int], budget: int) -> list[tuple[int, ...]]:
        """Indices in batches for forwards without gradients."""
        return list(pack([example.tokens for example in self.examples], iter(indices), budget))


def use_bfloat16(arithmetic: str, dtype: torch.dtype, device: torch.device) -> bool:
    """True if a forward multiplies in bfloat16 though the weights are float32.

    Args:
        arithmetic: "float32", "bfloat16", or "auto": bfloat16 where the processor has it, several times as fast.
        dtype: of the weights.
    """
    if arithmetic == "float32" or dtype != torch.float32:
        return False
    if arithmetic == "bfloat16":
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BFLOAT16_ARITHMETIC)
