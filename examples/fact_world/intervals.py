"""95% intervals of shares of tasks, and of differences between two runs of the same tasks."""

import math
from collections.abc import Sequence

Z = 1.959964  # of a normal distribution, two-sided 95%


def wilson(right: int, tasks: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share = right / tasks
    middle = share + Z**2 / (2 * tasks)
    half = Z * math.sqrt(share * (1 - share) / tasks + Z**2 / (4 * tasks**2))
    scale = 1 + Z**2 / tasks
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def paired_difference(left: Sequence[bool], right: Sequence[bool]) -> tuple[float, float, float]:
    """The difference of two shares of the same tasks, left less right, and its interval.

    Newcombe's method for paired samples (1998, method 10), built on Wilson's intervals, with a continuity correction of
    the correlation; it also holds where all tasks agree.
    """
    tasks = len(left)
    if tasks != len(right) or not tasks:
        raise ValueError(f"{tasks} and {len(right)} results can't be paired")
    both = sum(a and b for a, b in zip(left, right, strict=True))
    only_left = sum(left) - both
    only_right = sum(right) - both
    neither = tasks - both - only_left - only_right
    p_left, p_right = sum(left) / tasks, sum(right) / tasks
    (low_left, high_left), (low_right, high_right) = wilson(sum(left), tasks), wilson(sum(right), tasks)
    margins = (both + only_left) * (both + only_right) * (neither + only_left) * (neither + only_right)
    product: float = both * neither - only_left * only_right
    if product > 0:
        product = max(product - tasks / 2, 0.0)
    phi = 0.0 if margins == 0 else product / math.sqrt(margins)
    down_left, up_left = p_left - low_left, high_left - p_left
    down_right, up_right = p_right - low_right, high_right - p_right
    below = math.sqrt(max(0.0, down_left**2 - 2 * phi * down_left * up_right + up_right**2))
    above = math.sqrt(max(0.0, up_left**2 - 2 * phi * up_left * down_right + down_right**2))
    difference = p_left - p_right
    return difference, difference - below, difference + above
