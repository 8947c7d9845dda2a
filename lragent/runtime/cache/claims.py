"""Claims on pages: a request that is about to compute a page claims its key, so that others wait and reuse it."""

from __future__ import annotations

from collections.abc import Collection, Hashable

from lragent.errors import InternalError


class Claims:
    """Claimed keys and their claimants (requests). The first claimant of a key keeps it until the claim ends."""

    def __init__(self) -> None:
        self._claimant: dict[bytes, Hashable] = {}
        self._keys: dict[Hashable, set[bytes]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._claimant

    def add(self, key: bytes, claimant: Hashable) -> None:
        """Claims a key; no change if the key is claimed already."""
        if key not in self._claimant:
            self._claimant[key] = claimant
            self._keys.setdefault(claimant, set()).add(key)

    def end(self, key: bytes, claimant: Hashable) -> None:
        """Ends a claim; no change if the key is not claimed by this claimant."""
        if key in self._keys.get(claimant, ()):
            del self._claimant[key]
            self._keys[claimant].discard(key)

    def end_all(self, claimant: Hashable) -> None:
        """Ends all claims of a claimant."""
        for key in self._keys.pop(claimant, ()):
            del self._claimant[key]

    def claimed_by_other(self, key: bytes, claimant: Hashable) -> bool:
        return self._claimant.get(key, claimant) is not claimant

    def check(self, running: Collection[Hashable]) -> None:
        """Proves that both directions agree and that every claimant is running.

        Raises:
            InternalError: they disagree.
        """
        for key, claimant in self._claimant.items():
            if claimant not in running or key not in self._keys.get(claimant, ()):
                raise InternalError("a page is claimed by a request that isn't running")
        if sum(map(len, self._keys.values())) != len(self._claimant):
            raise InternalError(f"requests hold claims that aren't among the {len(self._claimant)} claimed keys")
