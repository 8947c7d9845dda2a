"""From the state of a trajectory to its record."""

from __future__ import annotations

from lragent.runtime.record import AgentSpan, TrajectoryRecord
from lragent.runtime.trajectory_state import TrajectoryState


def record_of(state: TrajectoryState) -> TrajectoryRecord:
    """The record of a trajectory as it is now; also of a closed one."""
    generated: list[AgentSpan] = []
    seeds: list[int] = []
    finish_reasons: list[str] = []
    stop_reasons: list[str | int | None] = []
    for part in state.segments:
        if part.agent is None or part.seed is None or part.finish_reason is None:
            continue
        generated.append(AgentSpan(part.agent, part.adapter, part.start, part.end))
        seeds.append(part.seed)
        finish_reasons.append(part.finish_reason)
        stop_reasons.append(part.stop_reason)
    written = [
        AgentSpan(writer.agent, writer.digest, part.start, part.end)
        for _, table in sorted(state.page_tables.items())
        for part in table.log
        for writer in (state.version_in(part.agent),)
    ]
    return TrajectoryRecord(
        token_ids=list(state.tokens),
        generated=generated,
        written=written,
        logprobs=list(state.logprobs),
        sampled_logprobs=list(state.sampled_logprobs),
        kept_mass=list(state.kept_mass),
        seeds=seeds,
        finish_reasons=finish_reasons,
        stop_reasons=stop_reasons,
    )
