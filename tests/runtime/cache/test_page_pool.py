import pytest

from lragent.errors import InternalError
from lragent.runtime.cache.memory import PageBytes
from lragent.runtime.cache.page_pool import PagePool
from lragent.runtime.cache.prefix_index import PrefixIndex

SIZES = PageBytes(base=100, low_rank=(0, 10, 20))


def pool(pages: int = 4, track_lr: bool = False) -> PagePool:
    return PagePool(pages + 1, SIZES, PrefixIndex(), track_lr)


def test_all_pages_but_scratch_are_handed_out_once() -> None:
    p = pool(4)
    pages = [p.allocate() for _ in range(4)]
    assert sorted(pages) == [1, 2, 3, 4]
    p.check([pages])
    with pytest.raises(InternalError, match="free 0"):
        p.allocate()


def test_a_page_is_free_when_its_last_holder_lets_go() -> None:
    p = pool()
    page = p.allocate()
    p.hold(page)
    p.release([page])
    assert p.held == 1
    p.check([[page]])
    p.release([page])
    assert (p.free, p.held, p.cached) == (4, 0, 0)
    with pytest.raises(InternalError, match="without a holder"):
        p.release([page])


def test_indexed_pages_stay_cached_and_are_evicted_least_recently_released_first() -> None:
    p = pool(2)
    first, second = p.allocate(), p.allocate()
    p._index.insert(b"first", first)
    p._index.insert(b"second", second)
    p.release([second])
    p.release([first])
    assert p.cached == 2
    assert p.allocate() == second
    assert p._index.get(b"second") is None
    assert p._index.get(b"first") == first
    assert p.evictions == 1
    p.check([[second]])


def test_holding_a_cached_page_takes_it_out_of_eviction() -> None:
    p = pool(1)
    page = p.allocate()
    p._index.insert(b"key", page)
    p.release([page])
    p.hold(page)
    assert p.available == 0
    assert not p.is_exclusive(page)
    p.check([[page]])


def test_held_bytes_count_columns_only_where_they_are_filled() -> None:
    p = pool(track_lr=True)
    page = p.allocate()
    assert p.held_bytes == 100
    p.fill(page, 2, 3)
    p.fill(page, 0, 3)
    assert p.held_bytes == 120
    p.fill(page, 1, 1)
    p.clip(page, 2)
    assert (p.filled(page, 1), p.filled(page, 2)) == (1, 2)
    p.clip(page, 0)
    assert p.held_bytes == 100
    p.check([[page]])


def test_a_copy_has_the_columns_of_its_source() -> None:
    p = pool(track_lr=True)
    source, target = p.allocate(), p.allocate()
    p.fill(source, 1, 2)
    p.copy_filled(source, target)
    p.clip(target, 0)
    assert (p.filled(source, 1), p.filled(target, 1)) == (2, 0)
    assert p.held_bytes == 210


@pytest.mark.parametrize("damage", ["leak", "holders", "index"])
def test_check_names_the_sum_that_fails(damage: str) -> None:
    p = pool()
    page = p.allocate()
    if damage == "leak":
        p._free.pop()
        expected = r"free 2 \+ held 1 \+ cached 0 != 4"
    elif damage == "holders":
        p.holders[page] = 2
        expected = r"holder count 2 != 1"
    else:
        p._index.insert(b"key", page)
        del p._index.page_of[b"key"]
        expected = "0 keys != 1 pages"
    with pytest.raises(InternalError, match=expected):
        p.check([[page]])
