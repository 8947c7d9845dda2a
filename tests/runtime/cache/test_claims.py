import pytest

from lragent.errors import InternalError
from lragent.runtime.cache.claims import Claims


def test_the_first_claimant_keeps_a_key_until_it_ends_the_claim() -> None:
    claims = Claims()
    claims.add(b"key", "first")
    claims.add(b"key", "second")
    assert claims.claimed_by_other(b"key", "second") and not claims.claimed_by_other(b"key", "first")
    claims.end(b"key", "second")
    assert b"key" in claims
    claims.end(b"key", "first")
    assert b"key" not in claims and not claims.claimed_by_other(b"key", "second")
    claims.check([])


def test_end_all_leaves_the_claims_of_others() -> None:
    claims = Claims()
    for key, claimant in ((b"1", "x"), (b"2", "x"), (b"3", "y")):
        claims.add(key, claimant)
    claims.end_all("x")
    assert [key in claims for key in (b"1", b"2", b"3")] == [False, False, True]
    claims.check(["y"])


def test_check_finds_a_claim_of_a_request_that_is_not_running() -> None:
    claims = Claims()
    claims.add(b"key", "x")
    with pytest.raises(InternalError, match="isn't running"):
        claims.check(["y"])
