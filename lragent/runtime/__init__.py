"""Runs turns of agents over shared cache pages. The life of a token:

1. trajectory.py: `generate` checks the agent and the options.
2. make_request.py: the turn becomes a `Request` with the page table that it works on.
3. scheduling/scheduler.py: the request is admitted; scheduling/prefix_lookup.py finds pages that can be reused.
4. schemes.py: the sharing scheme lists the spans still to compute.
5. scheduling/batch.py: spans of all running requests are packed into one `StepInputs`.
6. loop.py: `Program.run` computes the step, writes K and V into the pages of cache/memory.py and returns logits.
7. scheduling/bookkeeping.py: the page table, the write log and the prefix index are brought up to date.
8. sampling/take_logits.py: the next token is sampled and appended; it is the next span, or the turn ends.
"""

from lragent.runtime.config import EngineConfig
from lragent.runtime.engine import Engine
from lragent.runtime.record import AgentSpan, TrajectoryRecord
from lragent.runtime.schemes import SCHEMES
from lragent.runtime.stats import EngineStats
from lragent.runtime.task_error import ErrorCause, TaskError
from lragent.runtime.task_loop import RolloutResult, Workflow
from lragent.runtime.trajectory import Trajectory
from lragent.runtime.trajectory_state import TurnSegment
from lragent.runtime.turn import Turn
from lragent.runtime.usage import Usage
from lragent.text.tokenizer import Tokenizer

__all__ = [
    "SCHEMES",
    "AgentSpan",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "ErrorCause",
    "RolloutResult",
    "TaskError",
    "Tokenizer",
    "Trajectory",
    "TrajectoryRecord",
    "Turn",
    "TurnSegment",
    "Usage",
    "Workflow",
]
