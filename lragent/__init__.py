"""LRAgent: one KV cache for all LoRA agents of a model."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lragent.api import convert, drift, inspect, load, optimize, rollout, tune, update, verify
    from lragent.artifact.build import ConvertReport
    from lragent.program.live_adapters import AdapterWeights
    from lragent.reports.drift_report import DriftReport
    from lragent.reports.inspection import Inspection
    from lragent.reports.verification import Verification
    from lragent.rollouts.run import RolloutSummary
    from lragent.runtime.engine import Engine
    from lragent.runtime.task_loop import RolloutResult
    from lragent.runtime.trajectory import Trajectory
    from lragent.runtime.turn import Turn
    from lragent.training.rows import Rows
    from lragent.training.schemes import rows_of
    from lragent.training.shared_model import SharedModel
    from lragent.training.turn_sequence import TurnSequence
    from lragent.tuning.options import TuneOptions
    from lragent.tuning.report import TuneReport
    from lragent.tuning.save_adapters import save_adapters

# Spin iterations of an idle OpenMP thread before it sleeps: about 0.3 ms. A step has about a hundred parallel regions
# in quick succession; threads that sleep between them (OMP_WAIT_POLICY=PASSIVE) double the time of a small step. GNU
# OpenMP reads the variable once, when torch loads it.
if "torch" not in sys.modules:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

__all__ = [
    "AdapterWeights",
    "ConvertReport",
    "DriftReport",
    "Engine",
    "Inspection",
    "RolloutResult",
    "RolloutSummary",
    "Rows",
    "SharedModel",
    "Trajectory",
    "TuneOptions",
    "TuneReport",
    "Turn",
    "TurnSequence",
    "Verification",
    "convert",
    "drift",
    "inspect",
    "load",
    "optimize",
    "rollout",
    "rows_of",
    "save_adapters",
    "tune",
    "update",
    "verify",
]

_HOMES = {
    "AdapterWeights": "lragent.program.live_adapters",
    "ConvertReport": "lragent.artifact.build",
    "DriftReport": "lragent.reports.drift_report",
    "Engine": "lragent.runtime.engine",
    "Inspection": "lragent.reports.inspection",
    "RolloutSummary": "lragent.rollouts.run",
    "RolloutResult": "lragent.runtime.task_loop",
    "Trajectory": "lragent.runtime.trajectory",
    "Rows": "lragent.training.rows",
    "SharedModel": "lragent.training.shared_model",
    "TuneOptions": "lragent.tuning.options",
    "TuneReport": "lragent.tuning.report",
    "Turn": "lragent.runtime.turn",
    "TurnSequence": "lragent.training.turn_sequence",
    "Verification": "lragent.reports.verification",
    "rows_of": "lragent.training.schemes",
    "save_adapters": "lragent.tuning.save_adapters",
}


def __getattr__(name: str) -> Any:
    """Imports public names on first use, which keeps `import lragent` cheap."""
    if name not in __all__:
        raise AttributeError(f"module 'lragent' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "lragent.api")), name)
