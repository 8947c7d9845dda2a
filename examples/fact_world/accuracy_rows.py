"""The rows of the accuracy table: adapter sets, how they were tuned, schemes, and numbers of tasks."""

from dataclasses import dataclass

SHIPPED = "as shipped"
FULL, SHORT = 200, 60  # tasks


@dataclass(frozen=True)
class Tuning:
    """One run of `lragent tune`.

    Args:
        sharing: the scheme that it tunes for; `non_shared` is the control.
        gold: True for cross-entropy on gold, False for KL to the agents' own distribution.
        add_modules: modules that get new adapters.
    """

    name: str
    sharing: str
    gold: bool
    add_modules: str = ""


@dataclass(frozen=True)
class Row:
    """One rollout of the table: adapters (`SHIPPED` or the name of a tuning), scheme, and number of held-out tasks."""

    adapters: str
    sharing: str
    tasks: int

    @property
    def name(self) -> str:
        return f"{self.adapters.replace(' ', '-')}.{self.sharing}"


TUNINGS = (
    Tuning("kl-base_lr", "base_lr_shared", gold=False),
    Tuning("ce-base_lr", "base_lr_shared", gold=True),
    Tuning("kl-neutral", "neutral_shared", gold=False),
    Tuning("ce-neutral", "neutral_shared", gold=True),
    Tuning("kl-neutral-all", "neutral_shared", gold=False, add_modules="all-linear"),
    Tuning("kl-full", "full_shared", gold=False),
    Tuning("ce-control", "non_shared", gold=True),
)
ROWS = (
    Row(SHIPPED, "non_shared", FULL),
    Row(SHIPPED, "base_lr_shared", FULL),
    Row(SHIPPED, "neutral_shared", FULL),
    Row(SHIPPED, "base_shared", SHORT),
    Row(SHIPPED, "rebase_shared", SHORT),
    Row(SHIPPED, "full_shared", SHORT),
    Row("kl-base_lr", "base_lr_shared", FULL),
    Row("ce-base_lr", "base_lr_shared", FULL),
    Row("kl-neutral", "neutral_shared", FULL),
    Row("ce-neutral", "neutral_shared", FULL),
    Row("kl-neutral-all", "neutral_shared", FULL),
    Row("kl-base_lr", "base_shared", SHORT),
    Row("kl-base_lr", "rebase_shared", SHORT),
    Row("kl-base_lr", "full_shared", SHORT),
    Row("kl-full", "full_shared", SHORT),
    Row("kl-base_lr", "non_shared", FULL),
    Row("ce-base_lr", "non_shared", FULL),
    Row("ce-control", "non_shared", FULL),
    Row("ce-control", "base_lr_shared", FULL),
)


@dataclass(frozen=True)
class Bar:
    """A difference that is wanted: `left` less `right`, paired by task."""

    name: str
    left: Row
    right: Row


def _row(adapters: str, sharing: str) -> Row:
    return next(row for row in ROWS if (row.adapters, row.sharing) == (adapters, sharing))


BARS = (
    Bar(
        "(a) tuned by cross-entropy, less the control",
        _row("ce-base_lr", "base_lr_shared"),
        _row("ce-control", "non_shared"),
    ),
    Bar("(b) tuned by KL, less as shipped", _row("kl-base_lr", "base_lr_shared"), _row(SHIPPED, "non_shared")),
    Bar(
        "neutral_shared tuned by KL, less as shipped", _row("kl-neutral", "neutral_shared"), _row(SHIPPED, "non_shared")
    ),
    Bar(
        "neutral_shared, all linear layers, less as shipped",
        _row("kl-neutral-all", "neutral_shared"),
        _row(SHIPPED, "non_shared"),
    ),
)
