"""The steps of a round."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lragent.errors import TuneError
from lragent.tuning.batch_rows import token_weights
from lragent.tuning.batches import Batch, for_step
from lragent.tuning.checkpoint import RoundState, all_finite, save_checkpoint
from lragent.tuning.loss import token_losses
from lragent.tuning.material import Material
from lragent.tuning.measure import sums_by_example
from lragent.tuning.optimizer import clip, set_rate
from lragent.tuning.options import TuneOptions


@dataclass(frozen=True)
class TuneStep:
    """News of a round, for a progress bar.

    Args:
        step, steps: done and planned.
        loss: mean of a generated token in the last step; None before the first.
        held_out: newest value on the held-out trajectories; None before the first.
        seconds_left: estimate for the steps and the report that are left.
    """

    step: int
    steps: int
    loss: float | None
    held_out: float | None
    seconds_left: float


@dataclass(frozen=True)
class Round:
    """Everything that stays the same in a round.

    Args:
        batches: one for each step.
        held_out: indices of held-out examples.
        peak_rate: learning rate after warm-up.
        checkpoint: file; facts: see `save_checkpoint`.
        seconds_a_step, seconds_of_report: estimates.
    """

    material: Material
    scheme: str
    options: TuneOptions
    batches: Sequence[Batch]
    held_out: tuple[int, ...]
    peak_rate: float
    checkpoint: Path
    facts: dict[str, Any]
    seconds_a_step: float
    seconds_of_report: float

    def save(self, state: RoundState) -> None:
        save_checkpoint(self.checkpoint, state, self.facts)


@dataclass(frozen=True)
class StepLoss:
    """Loss of a batch.

    Args:
        total: with its graph; what the step makes smaller.
        generated: the part of generated tokens, the mean loss of one; comparable with `held_out_loss`.
    """

    total: Tensor
    generated: float


def loss_of(material: Material, batch: Batch) -> StepLoss:
    """The loss of a batch."""
    rows = material.rows(batch.scheme, batch.examples)
    scored = material.scored(rows, material.hidden(rows), batch.indices, batch.examples)
    kl_R, cross_entropy_R = token_losses(material.model.logits, scored, material.vocab_size)
    weights = token_weights(batch.examples, material.device)
    generated = (kl_R * weights.kl_R + cross_entropy_R * weights.cross_entropy_R).sum()
    appended = (kl_R * weights.appended_kl_R).sum()
    return StepLoss(generated + appended, float(generated.detach()))


def train(this: Round, state: RoundState, on_step: Callable[[TuneStep], None] | None = None) -> None:
    """Takes the steps that are left; afterwards the parameters are those that the evaluations kept.

    The first evaluation is before the first step, so that parameters which every step makes worse stay as they are. A
    checkpoint is written after the loss of its parameters was found finite.

    Raises:
        TuneError: a loss or a gradient is NaN or infinite; the last checkpoint is a good one.
    """
    progress, options = state.progress, this.options
    every = math.ceil(progress.steps / options.evaluations)
    ticked = saved = time.monotonic()

    def news() -> None:
        if on_step is not None:
            loss = progress.losses[-1][1] if progress.losses else None
            held_out = progress.held_out[-1][1] if progress.held_out else None
            left = (progress.steps - progress.step) * this.seconds_a_step + this.seconds_of_report
            on_step(TuneStep(progress.step, progress.steps, loss, held_out, left))

    news()
    if this.held_out and not progress.held_out:
        _evaluate(this, state)
    while not progress.ended:
        batch = for_step(this.batches[progress.step], progress.step, this.scheme, this.material.model.agents, options)
        loss = loss_of(this.material, batch)
        _require_finite("loss", float(loss.total.detach()), this, state)
        if time.monotonic() - saved >= options.checkpoint_seconds:
            this.save(state)
            saved = time.monotonic()
        loss.total.backward()
        _require_finite("gradient", clip(state.optimizer), this, state)
        set_rate(state.optimizer, this.peak_rate, progress.step, progress.steps)
        state.optimizer.step()
        state.optimizer.zero_grad()
        progress.losses.append((progress.step, loss.generated))
        progress.step += 1
        if this.held_out and (progress.step % every == 0 or progress.step == progress.steps):
            _evaluate(this, state)
        progress.seconds += time.monotonic() - ticked
        ticked = time.monotonic()
        if progress.seconds >= progress.seconds_allowed and not progress.ended:
            progress.stopped = "time"
            if this.held_out:
                _evaluate(this, state)
        news()
    if not all_finite(state.parameters):
        raise _diverged("a weight", this, state)
    this.save(state)
    state.use_kept()


def _evaluate(this: Round, state: RoundState) -> None:
    """Measures the loss on the held-out examples; keeps the parameters unless they are worse than the best so far.

    A few trajectories tell two sets of weights apart only if they differ much. Of weights that are not told apart, the
    later ones have learned from more.
    """
    progress = state.progress
    parts = held_out_loss(this.material, this.scheme, this.held_out, this.options.batch_tokens)
    value = sum(parts)
    _require_finite("held-out loss", value, this, state)
    progress.held_out.append((progress.step, value))
    if progress.best and is_worse(parts, progress.best):
        progress.worse += 1
        if progress.worse == this.options.patience and not progress.ended:
            progress.stopped = "no improvement"
        return
    if not progress.best or value < sum(progress.best):
        progress.best = parts
    progress.kept_step, progress.worse = progress.step, 0
    state.keep()


def is_worse(parts: Sequence[float], best: Sequence[float]) -> bool:
    """True if a loss is larger than another by more than twice the standard error of the difference.

    Args:
        parts, best: the same examples' parts of the two losses; of one example, any larger loss is worse.
    """
    differences = [part - other for part, other in zip(parts, best, strict=True)]
    if len(differences) == 1:
        return differences[0] > 0
    error = math.sqrt(len(differences)) * statistics.stdev(differences)
    return sum(differences) > 2 * error


def held_out_loss(material: Material, scheme: str, held_out: Sequence[int], batch_tokens: int) -> list[float]:
    """Each example's part of the mean loss of a token under the scheme; the sum is the loss. KL alone by default."""
    found = sums_by_example(material, scheme, held_out, batch_tokens)
    tokens = sum(sums.tokens for sums in found.values())
    examples = material.examples
    return [
        (examples[index].kl * sums.kl + examples[index].cross_entropy * sums.cross_entropy) / tokens
        for index, sums in found.items()
    ]


def _require_finite(what: str, value: float, this: Round, state: RoundState) -> None:
    if not math.isfinite(value):
        raise _diverged(f"the {what}", this, state)


def _diverged(what: str, this: Round, state: RoundState) -> TuneError:
    kept = f"{this.checkpoint} keeps the last good weights" if this.checkpoint.exists() else "no checkpoint was written"
    rate = this.peak_rate
    return TuneError(
        f"{what} of step {state.progress.step + 1} is NaN or infinite; {kept}",
        f"Go on from there with a lower rate (--resume --learning-rate {rate / 3:.1g}), or use --dtype float32.",
    )
