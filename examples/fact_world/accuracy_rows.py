"""The rows of the accuracy table: adapter sets, how they were tuned, schemes, and numbers of tasks."""

from dataclasses import dataclass

SHIPPED, ORDINARY = "as shipped", "ordinary"
FULL, ORDINARY_TASKS, SHORT, PADDED = 200, 100, 60, 40  # tasks
PADDED_TOKENS = 4000  # of a padded trajectory


@dataclass(frozen=True)
class Tuning:
    """One run of `lragent tune`.

    Args:
        parent: the set that it tunes, `SHIPPED` or `ORDINARY`.
        sharing: the scheme that it tunes for; `non_shared` is the control.
        gold: True for cross-entropy on gold, False for KL to the agents' own distribution.
        add_modules: modules that get new adapters.
        steps_of: name of another tuning, whose number of steps it takes however long they last; "": as many as fit into
            the default time.
    """

    name: str
    sharing: str
    gold: bool
    add_modules: tuple[str, ...] = ()
    parent: str = SHIPPED
    steps_of: str = ""


@dataclass(frozen=True)
class Row:
    """One rollout of the table.

    Args:
        adapters: `SHIPPED`, `ORDINARY`, or the name of a tuning.
        tasks: number of held-out tasks.
        padded: True if notes before the question pad each trajectory to `PADDED_TOKENS`.
    """

    adapters: str
    sharing: str
    tasks: int
    padded: bool = False

    @property
    def name(self) -> str:
        return f"{self.adapters.replace(' ', '-')}.{self.sharing}{'.padded' if self.padded else ''}"


TUNINGS = (
    Tuning("kl-base_lr", "base_lr_shared", gold=False),
    Tuning("ce-base_lr", "base_lr_shared", gold=True),
    Tuning("kl-neutral", "neutral_shared", gold=False),
    Tuning("ce-neutral", "neutral_shared", gold=True),
    Tuning("kl-neutral-all", "neutral_shared", gold=False, add_modules=("all-linear",)),
    Tuning("kl-full", "full_shared", gold=False),
    Tuning("ce-control", "non_shared", gold=True, steps_of="ce-base_lr"),
    Tuning("ordinary-kl-base_lr", "base_lr_shared", gold=False, parent=ORDINARY),
    Tuning("ordinary-ce-base_lr", "base_lr_shared", gold=True, parent=ORDINARY),
    Tuning("ordinary-kl-neutral", "neutral_shared", gold=False, parent=ORDINARY),
    Tuning("ordinary-ce-neutral", "neutral_shared", gold=True, parent=ORDINARY),
    Tuning("ordinary-kl-full", "full_shared", gold=False, parent=ORDINARY),
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
    Row(SHIPPED, "non_shared", PADDED, padded=True),
    Row("kl-base_lr", "base_lr_shared", PADDED, padded=True),
    Row("kl-neutral", "neutral_shared", PADDED, padded=True),
    Row(ORDINARY, "non_shared", ORDINARY_TASKS),
    Row(ORDINARY, "base_lr_shared", ORDINARY_TASKS),
    Row(ORDINARY, "neutral_shared", ORDINARY_TASKS),
    Row("ordinary-kl-base_lr", "base_lr_shared", ORDINARY_TASKS),
    Row("ordinary-ce-base_lr", "base_lr_shared", ORDINARY_TASKS),
    Row("ordinary-kl-neutral", "neutral_shared", ORDINARY_TASKS),
    Row("ordinary-ce-neutral", "neutral_shared", ORDINARY_TASKS),
    Row("ordinary-kl-base_lr", "full_shared", ORDINARY_TASKS),
    Row("ordinary-kl-full", "full_shared", ORDINARY_TASKS),
    Row("ordinary-kl-base_lr", "non_shared", ORDINARY_TASKS),
)


@dataclass(frozen=True)
class Bar:
    """A difference that is wanted: `left` less `right`, paired by task."""

    name: str
    left: Row
    right: Row


def _row(adapters: str, sharing: str) -> Row:
    return next(row for row in ROWS if (row.adapters, row.sharing, row.padded) == (adapters, sharing, False))


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
    Bar(
        "ordinary set, tuned by KL, less as trained",
        _row("ordinary-kl-base_lr", "base_lr_shared"),
        _row(ORDINARY, "non_shared"),
    ),
    Bar(
        "ordinary set, neutral_shared tuned by KL, less as trained",
        _row("ordinary-kl-neutral", "neutral_shared"),
        _row(ORDINARY, "non_shared"),
    ),
)
