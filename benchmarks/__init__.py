import lragent  # noqa: F401  before torch: it sets how threads wait
