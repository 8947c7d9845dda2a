"""A trajectory as the caller sees it: a growing token sequence that agents read and extend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from lragent.errors import CacheMemoryError, RequestError
from lragent.runtime.cache.write_log import extent
from lragent.runtime.loop import EngineLoop
from lragent.runtime.request import Request
from lragent.runtime.sampling.stop_watch import StopWatch
from lragent.runtime.trajectory_state import Segment, TrajectoryState
from lragent.runtime.turn import Turn, TurnOptions, as_ids
from lragent.runtime.usage import Usage


@dataclass(eq=False)
class Trajectory:
    """Made by `Engine.trajectory`. One turn at a time; not for use from several threads.

    Turns raise RequestError for an unknown agent, bad options, an empty or too long trajectory, or while another turn
    is in progress; CacheMemoryError if the trajectory doesn't fit into the cache. The trajectory is then as before.
    """

    _loop: EngineLoop
    _state: TrajectoryState

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._state.tokens)

    @property
    def token_ids(self) -> list[int]:
        return list(self._state.tokens)

    @property
    def logprobs(self) -> list[float | None]:
        """One a token: log-probability under the agent that generated it, None for appended tokens."""
        return list(self._state.logprobs)

    @property
    def usage(self) -> Usage:
        """What all turns, scores and adapter-free passes of this trajectory and its forks have computed."""
        total = Usage()
        total.add(self._state.usage)
        return total

    def segments(self) -> list[Segment]:
        """Who each part of the trajectory is from."""
        return list(self._state.segments)

    def append(self, piece: str | Sequence[int]) -> None:
        """Adds text (without special tokens, never tokenised together with its neighbours) or token ids."""
        self._check_idle("append")
        self._state.add_tokens(self.encode(piece, special=False), agent=None)

    def encode(self, piece: str | Sequence[int], special: bool) -> list[int]:
        """Token ids of a piece.

        Raises:
            RequestError: text without a tokenizer or that is no Unicode, or an id outside the vocabulary.
        """
        if not isinstance(piece, str):
            return as_ids(piece, self._loop.program.vocab_size)
        if self._loop.tokenizer is None:
            raise RequestError("text needs a tokenizer, and this engine has none", "Pass token ids, or a tokenizer.")
        try:
            piece.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"character {error.start} of the text is half a surrogate pair") from error
        return as_ids(self._loop.tokenizer.encode(piece, add_special_tokens=special), self._loop.program.vocab_size)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        self._check_idle("truncate")
        if not 0 <= length <= len(self):
            raise RequestError(f"truncate to {length} tokens: the trajectory has {len(self)}")
        self._state.cut(length, self._loop.cache)

    def fork(self) -> Trajectory:
        """A second trajectory with the same tokens; it shares pages until one of the two writes into them."""
        self._check_idle("fork")
        self._settle_now()
        return self._fork()

    def _fork(self) -> Trajectory:
        state = self._state.fork(self._loop.cache)
        self._loop.states[state] = None
        return Trajectory(self._loop, state)

    def generate(
        self,
        agent: str,
        *,
        max_new_tokens: int = 64,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = False,
        forced: Sequence[int] | None = None,
    ) -> Turn:
        """One turn of an agent; arguments as in `TurnOptions`. Other requests in progress are served with it."""
        options = TurnOptions(
            max_new_tokens, stop, stop_token_ids, temperature, top_k, top_p, min_p, seed, ignore_eos, forced
        )
        request = self._submit_turn(agent, options)
        self._loop.drive(request)
        return self._turn(agent, request)

    async def agenerate(
        self,
        agent: str,
        *,
        max_new_tokens: int = 64,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        ignore_eos: bool = False,
        forced: Sequence[int] | None = None,
    ) -> Turn:
        """As `generate`; turns of many trajectories that are awaited at the same time are batched together."""
        options = TurnOptions(
            max_new_tokens, stop, stop_token_ids, temperature, top_k, top_p, min_p, seed, ignore_eos, forced
        )
        request = self._submit_turn(agent, options)
        await self._loop.wait(request)
        return self._turn(agent, request)

    def score(self, agent: str, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of `token_ids` as a continuation by `agent`; the trajectory stays as it is."""
        self._check_score(agent, token_ids)
        self._settle_now()
        with self._fork() as scratch:
            request = scratch._submit_score(agent, token_ids)
            self._loop.drive(request)
            return request.logprobs

    async def ascore(self, agent: str, token_ids: Sequence[int]) -> list[float]:
        """As `score`, batched with everything that is awaited at the same time."""
        self._check_score(agent, token_ids)
        settle = self._settling()
        if settle is not None:
            self._loop.submit(settle)
            await self._loop.wait(settle)
        with self._fork() as scratch:
            request = scratch._submit_score(agent, token_ids)
            await self._loop.wait(request)
            return request.logprobs

    def close(self) -> None:
        """Gives all pages back; a turn in progress ends with RequestError."""
        active = self._loop.active.get(self._state)
        if active is not None:
            self._loop.end(active, RequestError("the trajectory was closed during a turn"))
        self._loop.close(self._state)

    def _check_idle(self, action: str) -> None:
        if self._state.closed:
            raise RequestError(f"{action}: the trajectory is closed")
        if self._state in self._loop.active:
            raise RequestError(f"{action}: a turn is in progress", "A trajectory takes one turn at a time.")

    def _agent_id(self, agent: str) -> int:
        if agent not in self._loop.acting:
            raise RequestError(f"unknown agent {agent!r}", f"Agents are: {', '.join(self._loop.acting)}.")
        return self._loop.names.index(agent)

    def _submit_turn(self, agent: str, options: TurnOptions) -> Request:
        agent_id = self._agent_id(agent)
        self._check_idle("generate")
        self._check_length(len(self))
        if options.forced is not None:
            options = replace(options, forced=as_ids(options.forced, self._loop.program.vocab_size))
        stops = set(options.stop_token_ids)
        if not options.ignore_eos:
            stops |= self._loop.stop_token_ids
        request = self._request(agent_id, options, StopWatch(self._loop.tokenizer, options.stop_strings, stops))
        self._loop.submit(request)
        return request

    def _request(self, agent: int | None, options: TurnOptions, watch: StopWatch) -> Request:
        owner = self._loop.owner(agent)
        table = self._state.table_for(owner, len(self._loop.names), self._loop.rules[owner])
        length = len(self)
        return Request(self._state, table, agent, options, watch, length, extent(table.runs), logits_from=length - 1)

    def _turn(self, agent: str, request: Request) -> Turn:
        if request.options.forced is not None:
            for token in request.token_ids:
                request.watch.push(token)
        return Turn(
            agent,
            request.token_ids,
            request.watch.text(),
            request.logprobs,
            request.finish_reason,
            request.usage,
        )

    def _check_length(self, length: int) -> None:
        most = self._loop.program.max_positions
        if length == 0:
            raise RequestError("the trajectory is empty", "Append something before the first turn.")
        if length > most:
            raise RequestError(
                f"the trajectory has {length} tokens, the model has {most} positions", "Truncate it, or start shorter."
            )
        pages, page_size = self._loop.cache.pool.total, self._loop.cache.page_size
        if self._loop.cache.pages_for(length) > pages:
            raise CacheMemoryError(
                f"a trajectory of {length} tokens can't ever fit: the cache has {pages} pages of {page_size} tokens",
                "Give a larger kv_memory, or truncate the trajectory.",
            )

    def _check_score(self, agent: str, token_ids: Sequence[int]) -> None:
        self._agent_id(agent)
        self._check_idle("score")
        if len(token_ids) == 0:
            raise RequestError("score: no tokens given")
        as_ids(token_ids, self._loop.program.vocab_size)
        self._check_length(len(self))
        self._check_length(len(self) + len(token_ids) - 1)

    def _submit_score(self, agent: str, token_ids: Sequence[int]) -> Request:
        """Called on a scratch fork, which takes all tokens but the last: that one is never processed."""
        first = len(self) - 1
        ids = as_ids(token_ids, self._loop.program.vocab_size)
        self._state.add_tokens(ids[:-1], agent=None)
        request = self._request(self._agent_id(agent), TurnOptions(forced=ids), StopWatch(self._loop.tokenizer, (), ()))
        request.score, request.logits_from = True, first
        self._loop.submit(request)
        return request

    def _settling(self) -> Request | None:
        """The adapter-free pass that is still due before others may read these pages; None if none is.

        Where pages were lost nothing is due: the next reader replays everything anyway.
        """
        table = self._state.tables.get(0)
        if not self._loop.scheme.adapter_free or table is None or table.settled == table.computed:
            return None
        return self._request(None, TurnOptions(), StopWatch(None, (), ()))

    def _settle_now(self) -> None:
        settle = self._settling()
        if settle is not None:
            self._loop.submit(settle)
            self._loop.drive(settle)
