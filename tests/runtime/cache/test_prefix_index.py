from lragent.runtime.cache.prefix_index import KeyRules, extend_keys
from lragent.runtime.cache.write_log import WriteRange

ROOT = b"r" * 32
BY_WRITER = KeyRules(ROOT, (b"base", b"x", b"y", b"x"), turn_starts=False)
BY_TURN = KeyRules(ROOT, (b"base", b"x#1", b"y#2", b"x#3"), turn_starts=True)
BY_TOKENS = KeyRules(ROOT, None, turn_starts=False)
TOKENS = list(range(100, 112))


def keys(rules: KeyRules, runs: list[WriteRange], tokens: list[int] = TOKENS) -> list[bytes]:
    result: list[bytes] = []
    extend_keys(result, rules, tokens, runs, runs[-1].end, 4)
    return result


def test_only_full_pages_have_keys() -> None:
    assert len(keys(BY_TOKENS, [WriteRange(1, 0, 11)])) == 2


def test_keys_depend_on_all_earlier_tokens() -> None:
    changed = [0, *TOKENS[1:]]
    runs = [WriteRange(1, 0, 12)]
    assert not set(keys(BY_TOKENS, runs)) & set(keys(BY_TOKENS, runs, changed))


def test_keys_depend_on_writers_by_digest_not_by_agent() -> None:
    plain = keys(BY_WRITER, [WriteRange(1, 0, 12)])
    assert keys(BY_WRITER, [WriteRange(3, 0, 12)]) == plain
    assert keys(BY_WRITER, [WriteRange(1, 0, 5), WriteRange(3, 5, 12)]) == plain
    assert keys(BY_WRITER, [WriteRange(2, 0, 12)])[0] != plain[0]
    other = keys(BY_WRITER, [WriteRange(1, 0, 5), WriteRange(2, 5, 6), WriteRange(1, 6, 12)])
    assert other[0] == plain[0]
    assert other[1] != plain[1]
    assert other[2] != plain[2]


def test_where_in_a_page_the_writer_changes_matters() -> None:
    assert keys(BY_WRITER, [WriteRange(1, 0, 1), WriteRange(2, 1, 4)]) != keys(
        BY_WRITER, [WriteRange(1, 0, 2), WriteRange(2, 2, 4)]
    )


def test_turn_starts_matter_where_columns_depend_on_them() -> None:
    one_turn, two_turns = [WriteRange(1, 0, 12)], [WriteRange(1, 0, 6), WriteRange(1, 6, 12)]
    assert keys(BY_WRITER, one_turn) == keys(BY_WRITER, two_turns)
    assert keys(BY_TURN, one_turn)[0] == keys(BY_TURN, two_turns)[0]
    assert keys(BY_TURN, one_turn)[1] != keys(BY_TURN, two_turns)[1]
    assert keys(BY_TURN, [WriteRange(0, 0, 12)]) == keys(BY_TURN, [WriteRange(0, 0, 6), WriteRange(0, 6, 12)])


def test_agents_of_equal_weights_differ_where_they_own_columns() -> None:
    assert keys(BY_TURN, [WriteRange(1, 0, 12)])[0] != keys(BY_TURN, [WriteRange(3, 0, 12)])[0]


def test_keys_can_be_extended_page_by_page() -> None:
    runs = [WriteRange(1, 0, 12)]
    result: list[bytes] = []
    for end in (3, 4, 9, 12):
        extend_keys(result, BY_WRITER, TOKENS, runs, end, 4)
    assert result == keys(BY_WRITER, runs)
