import pytest

from lragent_cli.quantities import show_bytes, show_count, show_seconds


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.50 KiB"), (47 * 1024, "47.0 KiB"), (512 * 2**20, "512 MiB"),
     (1000 * 2**20, "0.98 GiB"), (2 * 2**30, "2.00 GiB"), (5 * 2**40, "5.00 TiB")],
)  # fmt: skip
def test_bytes_have_three_digits(count: int, shown: str) -> None:
    assert show_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.5, "0.50 s"), (59.9, "59.9 s"), (60, "1 min 00 s"), (605.4, "10 min 05 s")]
)
def test_long_times_are_in_minutes(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


def test_counts_are_grouped() -> None:
    assert show_count(1234567.4) == "1 234 567"
