"""A trajectory as the caller sees it: a growing token sequence that agents read and extend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from lragent.errors import RequestError
from lragent.runtime.loop import EngineLoop
from lragent.runtime.make_record import record_of
from lragent.runtime.make_request import RequestMaker
from lragent.runtime.record import TrajectoryRecord
from lragent.runtime.request import Request
from lragent.runtime.task_scope import running_task
from lragent.runtime.trajectory_state import TrajectoryState, TurnSegment
from lragent.runtime.turn import Turn, TurnArguments, TurnOptions
from lragent.runtime.usage import Usage

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(eq=False)
class Trajectory:
    """Made by `Engine.trajectory`. One turn at a time; not for use from several threads.

    Turns raise RequestError for an unknown agent, bad options, an empty or too long trajectory, or while another turn
    is in progress; CacheMemoryError if the trajectory doesn't fit into the cache. The trajectory is then as before.
    """

    _loop: EngineLoop
    _make: RequestMaker
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
    def text(self) -> str:
        """Text of all tokens: the pieces that were appended and generated, joined.

        Special tokens of pieces are in it; those that the tokenizer put around the start are not. A character whose
        bytes are in two pieces is whole here.

        Raises:
            RequestError: the engine has no tokenizer.
        """
        return self._make.text(self._state)

    @property
    def logprobs(self) -> list[float | None]:
        """One per token: log-probability under the agent that generated it, None for appended tokens."""
        return list(self._state.logprobs)

    @property
    def usage(self) -> Usage:
        """Work of all turns, scores and adapter-free forwards of this trajectory and its forks."""
        total = Usage()
        total.add(self._state.usage)
        return total

    def segments(self) -> list[TurnSegment]:
        """Parts of the trajectory in order, each with the agent that generated it."""
        return list(self._state.segments)

    def append(self, piece: str | Sequence[int], parse_special: bool = True) -> None:
        """Adds token ids, or text, which is tokenized by itself; nothing is put in front of it.

        Args:
            parse_special: False: text that looks like a special or an added token, such as `<|im_end|>`, stays text.
                Use it for text from outside (results of tools, web pages).

        Raises:
            RequestError: text without a tokenizer or that is no Unicode, or an id outside the vocabulary.
        """
        self._check_idle("append")
        self._state.append(self._make.piece(piece, parse_special))

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        self._check_idle("truncate")
        if not 0 <= length <= len(self):
            raise RequestError(f"truncate to {length} tokens: the trajectory has {len(self)}")
        self._loop.truncate(self._state, length)

    def fork(self) -> Trajectory:
        """A second trajectory with the same tokens; it shares pages until one of the two writes into them.

        It draws other samples. In a run, it belongs to the task and is closed with it.
        """
        self._check_idle("fork")
        parent = self._state
        task = parent.task or running_task()
        if task is not None:
            task.require_running()
        self._settle_now()
        fork = self._fork()
        fork._state.task = task
        if task is parent.task:
            fork._state.seeds = parent.seeds.child(parent.forks)
            parent.forks += 1
        elif task is not None:
            fork._state.seeds = task.next_seeds()
        if task is not None:
            task.trajectories[fork] = None
        return fork

    def _fork(self) -> Trajectory:
        return Trajectory(self._loop, self._make, self._loop.fork(self._state))

    def generate(self, agent: str, **options: Unpack[TurnArguments]) -> Turn:
        """One turn of an agent. Requests of other trajectories that are in progress run in the same steps.

        Args:
            options: fields of `TurnOptions` (runtime/turn.py), such as max_new_tokens, stop, temperature, seed, forced.
        """
        request = self._submit_turn(agent, TurnOptions.of(options))
        self._loop.drive(request)
        return self._turn(agent, request)

    async def agenerate(self, agent: str, **options: Unpack[TurnArguments]) -> Turn:
        """As `generate`; turns of many trajectories that are awaited at the same time are batched together."""
        request = self._submit_turn(agent, TurnOptions.of(options))
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
        settle = self._make.settling(self._state)
        if settle is not None:
            self._loop.submit(settle)
            await self._loop.wait(settle)
        with self._fork() as scratch:
            request = scratch._submit_score(agent, token_ids)
            await self._loop.wait(request)
            return request.logprobs

    def record(self) -> TrajectoryRecord:
        """Tokens, spans of agents and the facts of sampling, as they are now."""
        return record_of(self._state)

    def close(self) -> None:
        """Releases all pages; a turn in progress ends with RequestError."""
        self._loop.close(self._state)
        if self._state.task is not None:
            self._state.task.trajectories.pop(self, None)

    def _check_idle(self, action: str) -> None:
        if self._state.closed:
            raise RequestError(f"{action}: the trajectory is closed")
        if self._loop.is_busy(self._state):
            raise RequestError(f"{action}: a turn is in progress", "A trajectory takes one turn at a time.")

    def _submit_turn(self, agent: str, options: TurnOptions) -> Request:
        self._make.roster.require(agent)
        self._check_idle("generate")
        self._make.check_length(len(self))
        request = self._make.turn(self._state, agent, options)
        self._loop.submit(request)
        return request

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
            request.sampled_logprobs,
            request.kept_mass,
            request.seed,
            request.stop_reason,
        )

    def _check_score(self, agent: str, token_ids: Sequence[int]) -> None:
        self._make.roster.require(agent)
        self._check_idle("score")
        if len(token_ids) == 0:
            raise RequestError("score: no tokens given")
        self._make.ids(token_ids)
        self._make.check_length(len(self))
        self._make.check_length(len(self) + len(token_ids) - 1)

    def _submit_score(self, agent: str, token_ids: Sequence[int]) -> Request:
        request = self._make.score(self._state, agent, token_ids)
        self._loop.submit(request)
        return request

    def _settle_now(self) -> None:
        settle = self._make.settling(self._state)
        if settle is not None:
            self._loop.submit(settle)
            self._loop.drive(settle)
