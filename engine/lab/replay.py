"""What would another policy have made of a recorded job? The real scheduler and planner, on the machine that the trace describes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.drafters.builtin import OFF, PORTFOLIO, TEXT
from engine.lab.machine import RecordedMachine
from engine.lab.simulator import Limits, Script, Simulator
from engine.lab.supply import Clock, ReplaySupply, Told
from engine.speculation.cost_model import CostModel, Load, best_batch, best_chunk
from engine.speculation.speculator import Speculator

if TYPE_CHECKING:
    from engine.lab.simulator import Machine, Simulation
    from engine.lab.trace import Trace

POLICIES = "plain, auto, fixed-K (K drafts a request and step), recorded (as the trace ran)"
_FIXED = re.compile(r"fixed-([1-9]\d*)")


class UnknownPolicyError(ValueError):
    """The message says which there are."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How to draft: `drafter` None means not at all, `fixed_drafts` None what the planner finds to pay."""

    name: str
    drafter: str | None
    fixed_drafts: int | None = None

    @staticmethod
    def of(name: str, trace: Trace) -> Policy:
        """Raises UnknownPolicyError. `auto` and `fixed-K` draft with the trace's drafter, with the best known one where that was off."""
        recorded = trace.engine.drafter
        drafter = recorded if recorded != OFF else PORTFOLIO if len(trace.engine.members) > 1 else TEXT
        if name == "plain":
            return Policy(name, None)
        if name == "auto":
            return Policy(name, drafter)
        if name == "recorded":
            return Policy(name, None if recorded == OFF else recorded, trace.engine.fixed_drafts)
        if (fixed := _FIXED.fullmatch(name)) is not None:
            return Policy(name, drafter, int(fixed[1]))
        raise UnknownPolicyError(f"there is no policy {name!r}; there are {POLICIES}")


def replay(trace: Trace, policy: Policy, *, max_sequences: int | None = None, machine: Machine | None = None) -> Simulation:
    """Runs the trace's answered requests under `policy` in virtual time. `max_sequences`: another batch size than the trace's."""
    engine = trace.engine
    sequences = max_sequences or engine.max_sequences
    fixed_drafts = policy.fixed_drafts or 0
    beside = engine.max_step_tokens - engine.max_sequences * (engine.fixed_drafts or 0)
    limits = Limits(
        max_sequences=sequences,
        max_step_tokens=max(beside, sequences) + sequences * fixed_drafts,
        num_blocks=engine.num_blocks,
        block_size=engine.block_size,
        max_positions=engine.max_positions,
        look_ahead=engine.look_ahead,
        share_prefixes=engine.share_prefixes,
        fixed_drafts=fixed_drafts,
    )
    speculator = None
    cost = CostModel(limits.max_step_tokens)
    if engine.profile:
        cost.profile([(Load(*sizes), seconds) for *sizes, seconds in engine.profile])
    if policy.drafter is not None:
        clock, told = Clock(), Told(engine.experience)
        supply = ReplaySupply.of(trace, told, clock)
        speculator = Speculator(
            engine.max_draft_tokens, sequences, cost, supply, fixed_drafts=policy.fixed_drafts, records=told, clock=clock
        )  # fmt: skip
    simulator = Simulator(limits, machine or RecordedMachine(trace), speculator, default=policy.drafter or OFF)
    if cost.ready:  # as the engine does with its profile
        simulator.scheduler.batch = best_batch(cost, sequences)
        simulator.scheduler.chunk = best_chunk(cost, simulator.scheduler.chunk)
    return simulator.run(scripts(trace))


def scripts(trace: Trace) -> list[Script]:
    """The trace's answered requests. What the source had ready when it was asked could have been had from the start."""
    found, since = [], 0.0
    began = trace.steps[0].at if trace.steps else 0.0
    for request, end in trace.answered():
        if request.awaited:
            since = max(request.at - began, 0.0)
        found.append(Script(request.request(), end.output, since))
    return found
