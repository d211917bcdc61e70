"""The engine's side of a trace: what it tells, where it was asked to keep one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafters.builtin import AUTO, OFF
from engine.lab.trace import EngineRecord, StepRecord, TraceWriter, survivals

if TYPE_CHECKING:
    from engine.batch import ModelSpec
    from engine.config import EngineConfig, Limits
    from engine.drafters.registry import Catalogue
    from engine.sequence import Sequence
    from engine.speculation.cost_model import CostModel, Load
    from engine.speculation.experience import Records
    from engine.types import FinishReason
    from engine.work import Outcome, Work


class Recorder:
    """Without a writer it does nothing."""

    def __init__(self, writer: TraceWriter | None) -> None:
        self._writer = writer
        self._awaited = False

    @staticmethod
    def of(
        config: EngineConfig,
        spec: ModelSpec,
        limits: Limits,
        profile: list[tuple[Load, float]],
        drafters: Catalogue,
        records: Records | None,
    ) -> Recorder:
        """The recorder that `config.trace` asks for. Raises OSError where its file cannot be written."""
        if config.trace is None:
            return Recorder(None)
        learning = drafters.members[1:]  # nothing is learned of the text lookup
        known = {} if records is None else {name: records.recall(name) for name in learning}
        engine = EngineRecord(
            model=spec.name,
            device=str(spec.device),
            max_sequences=limits.max_sequences,
            max_step_tokens=limits.max_step_tokens,
            num_blocks=limits.num_blocks,
            block_size=config.block_size,
            max_positions=spec.max_positions,
            look_ahead=config.look_ahead,
            share_prefixes=config.share_prefixes,
            drafter=drafters.resolve(AUTO) or OFF,
            members=drafters.members,
            max_draft_tokens=config.max_draft_tokens,
            fixed_drafts=config.fixed_drafts,
            profile=tuple((load.tokens, load.rows, load.kv_tokens, load.pairs, seconds) for load, seconds in profile),
            experience={name: experience.to_json() for name, experience in known.items() if experience is not None},
        )
        return Recorder(TraceWriter(config.trace, engine))

    def awaited(self) -> None:
        """The source had nothing to give just now: what comes next could not have been pulled earlier."""
        self._awaited = True

    def pulled(self, sequence: Sequence) -> None:
        if self._writer is not None:
            self._writer.request(sequence, awaited=self._awaited)
            self._awaited = False

    def ran(self, work: Work, outcome: Outcome, cost: CostModel) -> None:
        """A step that is just over; the cost model has not learned from it yet."""
        if self._writer is None:
            return
        load, proposal = work.load, work.proposal
        seconds, draft_seconds = outcome.nanoseconds * 1e-9, int(proposal.nanoseconds.sum()) * 1e-9
        some = bool(proposal.drafted.any())
        self._writer.step(
            StepRecord(
                at=round(self._writer.now() - seconds - draft_seconds, 6),
                tokens=load.tokens,
                rows=load.rows,
                kv_tokens=load.kv_tokens,
                pairs=load.pairs,
                decoding=work.num_decoding,
                chunks=len(work.chunks),
                seconds=seconds,
                draft_seconds=draft_seconds,
                predicted=cost.predict(load) if cost.ready else None,
                preempted=work.preempted,
                drafted=tuple(proposal.drafted.tolist()) if some else (),
                chosen=tuple(proposal.chosen.tolist()) if some else (),
                accepted=tuple(outcome.accepted[: work.num_decoding].tolist()) if some else (),
                survival=survivals(proposal.survival, proposal.drafted) if some else (),
                groups=tuple((name, tuple(rows.tolist())) for name, rows in proposal.groups) if some else (),
                passes=tuple((name, requests, nanoseconds * 1e-9) for name, requests, nanoseconds in proposal.passes),
            )
        )

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        if self._writer is not None:
            self._writer.end(sequence, reason)

    def flush(self) -> None:
        """What was told is in the file."""
        if self._writer is not None:
            self._writer.flush()
