"""Makes the requests of an engine: names, token ids, text and lengths are checked here, before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index

from lragent.errors import CacheMemoryError, RequestError
from lragent.program.program import Program
from lragent.runtime.cache.shared_cache import SharedCache
from lragent.runtime.cache.write_log import log_end
from lragent.runtime.request import Request
from lragent.runtime.roster import Roster
from lragent.runtime.sampling.stop_watch import StopWatch
from lragent.runtime.schemes import Scheme
from lragent.runtime.trajectory_state import TrajectoryState
from lragent.runtime.turn import TurnOptions, as_ids
from lragent.text.tokenizer import Tokenizer
from lragent.text.trajectory_text import trajectory_text


@dataclass(frozen=True)
class RequestMaker:
    """Fixed facts of an engine that new requests depend on.

    Args:
        stop_token_ids: the model's own stop tokens.
        roster: the agents' adapters, which `Engine.update_adapters` changes.
    """

    program: Program
    scheme: Scheme
    cache: SharedCache
    tokenizer: Tokenizer | None
    stop_token_ids: frozenset[int]
    roster: Roster

    def ids(self, token_ids: Sequence[int]) -> list[int]:
        """Token ids, checked against the vocabulary; RequestError for bad ones."""
        return as_ids(token_ids, self.program.vocab_size)

    def start(self, text: str | Sequence[int]) -> list[int]:
        """Token ids of a text that begins a trajectory, or given ones.

        Raises:
            RequestError: text without a tokenizer or that is no Unicode, or an id outside the vocabulary.
        """
        if not isinstance(text, str):
            return self.ids(text)
        return self._known(self._reader(text).encode(text, add_special_tokens=True))

    def piece(self, text: str | Sequence[int], parse_special: bool) -> list[int]:
        """Token ids of a text that is appended, or given ones; raises as `start` does."""
        if not isinstance(text, str):
            return self.ids(text)
        return self._known(self._reader(text).encode_piece(text, parse_special))

    def text(self, state: TrajectoryState) -> str:
        """Text of a trajectory; RequestError without a tokenizer."""
        start, reader = state.start, self._reader("")
        if start is None:
            return reader.decode_piece(state.tokens, skip_special_tokens=False)
        return trajectory_text(reader, state.tokens, start.text, start.tokens, start.whole)

    def _reader(self, text: str) -> Tokenizer:
        """The tokenizer; RequestError if there is none, or the text is no Unicode."""
        if self.tokenizer is None:
            raise RequestError("text needs a tokenizer, and this engine has none", "Pass token ids, or a tokenizer.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"character {error.start} of the text is half a surrogate pair") from error
        return self.tokenizer

    def _known(self, ids: list[int]) -> list[int]:
        """Ids of a text; RequestError for a token that the model lacks."""
        size = self.program.vocab_size
        beyond = next((index for index in ids if index >= size), None)
        if beyond is not None and self.tokenizer is not None:
            shown = self.tokenizer.decode_piece([beyond], skip_special_tokens=False)
            raise RequestError(
                f"the text has token {shown!r} (id {beyond}), the model's vocabulary has {size} tokens",
                "Leave it out, or resize the base model and convert again.",
            )
        return ids

    def check_length(self, length: int) -> None:
        """Raises RequestError or CacheMemoryError if no turn can begin with `length` tokens."""
        most = self.program.max_positions
        if length == 0:
            raise RequestError("the trajectory is empty", "Append something before the first turn.")
        if length > most:
            raise RequestError(
                f"the trajectory has {length} tokens, the model has {most} positions", "Truncate it, or start shorter."
            )
        pages, page_size = self.cache.pool.total, self.cache.page_size
        if self.cache.pages_for(length) > pages:
            raise CacheMemoryError(
                f"a trajectory of {length} tokens can't ever fit: the cache has {pages} pages of {page_size} tokens",
                "Give a larger kv_memory, or truncate the trajectory.",
            )

    def turn(self, state: TrajectoryState, agent: str, options: TurnOptions) -> Request:
        """A turn of an agent.

        Raises:
            RequestError: stop strings without a tokenizer, or a forced id outside the vocabulary.
        """
        if options.forced is not None:
            options = replace(options, forced=self.ids(options.forced))
            watch = StopWatch(self.tokenizer, (), ())
        else:
            own = frozenset() if options.ignore_eos else self.stop_token_ids | self._own_stops(agent)
            watch = StopWatch(self.tokenizer, options.stop_strings, options.stop_ids | own)
        request = self._request(state, agent, options, watch)
        request.seed = state.seeds.seed(state.turns) if options.seed is None else index(options.seed)
        return request

    def _own_stops(self, agent: str) -> frozenset[int]:
        return frozenset(stop for known in self.program.agents if known.name == agent for stop in known.stop_token_ids)

    def score(self, state: TrajectoryState, agent: str, token_ids: Sequence[int]) -> Request:
        """A score of `token_ids` on a scratch fork; the fork gets all tokens but the last, which is never processed."""
        first = len(state.tokens) - 1
        ids = self.ids(token_ids)
        state.append(ids[:-1])
        request = self._request(state, agent, TurnOptions(forced=ids), StopWatch(self.tokenizer, (), ()))
        request.score, request.logits_from = True, first
        return request

    def settling(self, state: TrajectoryState) -> Request | None:
        """The adapter-free forward that is due before others may read the pages; None if none is due.

        None is due where pages were lost: the next reader replays everything anyway.
        """
        table = state.page_tables.get(0)
        if not self.scheme.adapter_free_forward or table is None or table.settled == table.computed:
            return None
        return self._request(state, None, TurnOptions(), StopWatch(None, (), ()))

    def _request(self, state: TrajectoryState, agent: str | None, options: TurnOptions, watch: StopWatch) -> Request:
        slot = None if agent is None else self.roster.version(state, agent).slot
        table = self.roster.table(state, slot, self.cache)
        length = len(state.tokens)
        return Request(state, table, slot, options, watch, length, log_end(table.log), logits_from=length - 1)
