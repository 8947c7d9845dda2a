"""Options of `lragent tune`, and the defaults that depend on model and scheme."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lragent.errors import RequestError

Trained = Literal["both", "a", "b"]
Arithmetic = Literal["auto", "float32", "bfloat16"]

WIDTH = 576  # hidden size of the model for which the rate was found
LEARNING_RATE = 1e-3
APPENDED_KL = 0.1
# Options that may change when a run is resumed.
RESUMED_WITH_OTHERS = ("learning_rate", "minutes", "checkpoint_seconds", "report_schemes")


@dataclass(frozen=True)
class TuneOptions:
    """Options of a tuning run. Two runs with equal options on equal files take the same steps.

    Args:
        steps: most optimizer steps a round; fewer if they don't fit into `minutes`.
        minutes: time of a round in all, reports included.
        learning_rate: peak of the cosine schedule; None: by hidden size (`peak_rate`).
        batch_tokens: tokens of whole trajectories that a step takes; a longer trajectory is a step of its own.
        held_out: share of the trajectories that no step sees; at least one unless it is 0.
        patience: evaluations in a row that are worse than the best one, beyond noise, after which a round ends; 0: it
            goes on.
        evaluations: number of evaluations on held-out trajectories in a round, besides the one before its first step.
        kl: weight of KL(teacher || student), teacher: the adapters as given, under `non_shared`; None: 1 for what
            agents rolled out, 0 for gold.
        appended_kl: weight of the mean KL of appended tokens, each as predicted by the agent that processes it, beside
            that of generated ones. Nobody samples these predictions, but they show at many more tokens how a shared
            cache changes an agent. None: 0.1; 0 for `neutral_shared`, where each needs a row of its own.
        cross_entropy: weight of the cross-entropy of the generated tokens; None: 1 for gold, else 0.
        weight_field: entry of a line, such as "result.score", by which the cross-entropy of its tokens is multiplied;
            None: the line's reward if it has one, else 1.
        non_shared_share: share of the steps whose loss is that of `non_shared` instead of the scheme's.
        permuted_writers: share of the steps in which appended tokens are processed by an agent drawn at random.
        train: matrices that are trained: "a", "b" or "both".
        tie_a: True keeps a shared A shared.
        add_modules: ends of the names of linear modules that get new adapters, or "all-linear".
        add_rank: rank of the new adapters; None: that of the agent.
        seed: of the order of trajectories, held-out ones, writers and new adapters.
        dtype: of the base weights: "auto" (that of the run that wrote the trajectories, else the checkpoint's),
            "float32", "bfloat16" or "float16". Adapters are trained in float32.
        arithmetic: of a float32 model: "float32", "bfloat16", or "auto": bfloat16 where the processor has it.
        report_schemes: schemes that the report compares besides the target and `non_shared`.
        checkpoint_seconds: time between two checkpoints.
    """

    steps: int = 500
    minutes: float = 30.0
    learning_rate: float | None = None
    batch_tokens: int = 1200
    held_out: float = 0.1
    patience: int = 3
    evaluations: int = 8
    kl: float | None = None
    appended_kl: float | None = None
    cross_entropy: float | None = None
    weight_field: str | None = None
    non_shared_share: float = 0.0
    permuted_writers: float = 0.05
    train: Trained = "both"
    tie_a: bool = True
    add_modules: tuple[str, ...] = ()
    add_rank: int | None = None
    seed: int = 0
    dtype: str = "auto"
    arithmetic: Arithmetic = "auto"
    report_schemes: tuple[str, ...] = ()
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        rate = self.learning_rate
        weights = [weight for weight in (self.kl, self.cross_entropy) if weight is not None]
        checks = (
            (self.steps >= 1, f"steps is {self.steps}, must be at least 1"),
            (_above_0(self.minutes), f"minutes is {self.minutes}, must be above 0"),
            (rate is None or _above_0(rate), f"learning_rate is {rate}, must be above 0"),
            (self.batch_tokens >= 1, f"batch_tokens is {self.batch_tokens}, must be at least 1"),
            (0 <= self.held_out < 1, f"held_out is {self.held_out}, must be at least 0 and below 1"),
            (self.patience >= 0, f"patience is {self.patience}, must not be negative"),
            (self.evaluations >= 1, f"evaluations is {self.evaluations}, must be at least 1"),
            (all(w >= 0 for w in weights), f"kl is {self.kl} and cross_entropy {self.cross_entropy}: below 0"),
            ((self.appended_kl or 0) >= 0, f"appended_kl is {self.appended_kl}, must not be negative"),
            (len(weights) < 2 or sum(weights) > 0, "kl and cross_entropy are 0: there is no loss"),
            (_is_share(self.non_shared_share), f"non_shared_share is {self.non_shared_share}, must be from 0 to 1"),
            (_is_share(self.permuted_writers), f"permuted_writers is {self.permuted_writers}, must be from 0 to 1"),
            (self.train in get_args(Trained), f"train is {self.train!r}, must be both, a or b"),
            (
                self.arithmetic in get_args(Arithmetic),
                f"arithmetic is {self.arithmetic!r}, must be auto, float32 or bfloat16",
            ),
            (
                not isinstance(self.add_modules, str),
                f"add_modules is the text {self.add_modules!r}, must be a tuple of names",
            ),
            (self.add_rank is None or self.add_rank >= 1, f"add_rank is {self.add_rank}, must be at least 1"),
        )
        for holds, message in checks:
            if not holds:
                raise RequestError(message)

    def peak_rate(self, width: int) -> float:
        """The learning rate after warm-up. By default it falls with the square root of the hidden size.

        Args:
            width: hidden size of the model.
        """
        return self.learning_rate or LEARNING_RATE * math.sqrt(WIDTH / width)

    def appended_weight(self, scheme: str) -> float:
        """The weight of appended tokens under a scheme."""
        if self.appended_kl is not None:
            return self.appended_kl
        return 0.0 if scheme == "neutral_shared" else APPENDED_KL

    def loss_weights(self, gold: bool) -> tuple[float, float]:
        """Weights of KL and cross-entropy for a trajectory that is gold, or that agents rolled out."""
        kl = float(not gold) if self.kl is None else self.kl
        return kl, float(gold) if self.cross_entropy is None else self.cross_entropy


def _above_0(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _is_share(value: float) -> bool:
    return 0 <= value <= 1
