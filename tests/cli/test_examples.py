import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_optimize_runs_and_the_second_agent_reuses_the_first_ones_tokens() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "01_optimize.py"], capture_output=True, text=True, check=True)
    plan, action, *_, peak = done.stdout.splitlines()
    assert plan.strip().startswith("plan wrote [") and plan.endswith("computed 45, reused 0")
    assert action.startswith("action wrote [") and action.endswith("computed 16, reused 45")
    assert peak.startswith("cache at peak ")
