"""Runs agents' turns over shared pages: pages, prefix reuse, sharing schemes, scheduling, sampling, rollouts."""

from lragent.runtime.config import EngineConfig
from lragent.runtime.engine import Engine
from lragent.runtime.sampling.tokenizer import Tokenizer, TokenizerFile
from lragent.runtime.schemes import SCHEMES
from lragent.runtime.stats import EngineStats
from lragent.runtime.task_loop import RolloutResult, TaskError, Workflow
from lragent.runtime.trajectory import Trajectory
from lragent.runtime.trajectory_state import TurnSegment
from lragent.runtime.turn import Turn
from lragent.runtime.usage import Usage

__all__ = [
    "SCHEMES",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "RolloutResult",
    "TaskError",
    "Tokenizer",
    "TokenizerFile",
    "Trajectory",
    "Turn",
    "TurnSegment",
    "Usage",
    "Workflow",
]
