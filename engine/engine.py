"""The engine: requests in, results out, one packed step after the other."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.accounting import charge, estimate
from engine.config import EngineConfig, derive_limits
from engine.drafters.base import Host, Progress
from engine.drafters.builtin import OFF
from engine.drafters.registry import Catalogue, UnknownDrafterError
from engine.kv_blocks import BlockPool
from engine.kv_pool import KVPool
from engine.lab.recorder import Recorder
from engine.logit_rules import LogitRules
from engine.logprobs import Logprobs
from engine.memory import free_bytes, is_exhausted
from engine.profile import measure_steps, warm_up
from engine.row_table import RowTable
from engine.runner import make_runner
from engine.scheduler import Chunk, Scheduler, StepPlan, UnfitRequestError
from engine.speculation.cost_model import CostModel, Load
from engine.speculation.speculator import Proposal, Speculator
from engine.speculation.verify import verify
from engine.stats import EngineStats, Meter
from engine.stopping import StopWatch
from engine.tiers import fill
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, Request, Result, TokenLedger
from engine.work import Outcome, Work

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from engine.checkpoints import LoadedModel
    from engine.profile import Profiles
    from engine.sequence import Sequence

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.005
_RECLAIM_EVERY = 64
_NOTHING = np.empty(0, np.int64)


@dataclass(slots=True)
class _Live:
    """A request that is in the engine."""

    sequence: Sequence
    watch: StopWatch
    drafter: str | None


class Engine:
    """Runs one loaded model. `run` is driven by one thread; `abort` and `stats` may be called from any."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None, profiles: Profiles | None = None) -> None:
        """`profiles`: where the machine's profile is looked for before it is measured, and kept."""
        self.config = config = config or EngineConfig()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.spec = spec = loaded.model.spec
        self.tokenizer = Tokenizer(loaded.tokenizer)
        directory = getattr(loaded, "directory", None)
        self.drafters = Catalogue(config.drafter, directory, spec)  # an unknown default fails here, not at the first request
        self.limits = derive_limits(config, spec, free_bytes(spec.device), self.drafters.bytes_per_token)
        kv = KVPool(
            num_layers=spec.num_layers,
            num_blocks=self.limits.max_blocks,
            block_size=config.block_size,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.dtype,
            device=spec.device,
        )
        self._runner = make_runner(loaded.model, kv, self.limits.max_sequences)
        self._pool = BlockPool(self.limits.num_blocks, config.block_size, share_prefixes=config.share_prefixes)
        self._scheduler = Scheduler(
            self._pool,
            max_sequences=self.limits.max_sequences,
            max_step_tokens=self.limits.max_step_tokens,
            max_positions=spec.max_positions,
        )
        warm_up(self._runner)
        cost = CostModel(self.limits.max_step_tokens)
        self.profile_reused = False
        points: list[tuple[Load, float]] = []
        if config.drafter != OFF:
            points, self.profile_reused = (
                profiles.steps(self._runner, spec, self.limits.max_sequences)
                if profiles is not None
                else (measure_steps(self._runner, self.limits.max_sequences), False)
            )
            cost.profile(points)
        entropy = int.from_bytes(os.urandom(8)) if config.seed is None else config.seed
        self.drafters.prepare(
            Host(
                target=loaded.model,
                tokenizer=self.tokenizer,
                directory=directory,
                num_blocks=self.limits.max_blocks,
                block_size=config.block_size,
                max_sequences=self.limits.max_sequences,
                entropy=entropy,
            )
        )
        self._speculator = Speculator(
            config.max_draft_tokens, self.limits.max_sequences, cost, self.drafters, fixed_drafts=config.fixed_drafts
        )
        self._recorder = Recorder.of(config, spec, self.limits, points, self.drafters)
        self._table = RowTable(self.limits.max_sequences, entropy)
        self._rules = LogitRules()
        self._logprobs = Logprobs()
        self._live: dict[int, _Live] = {}
        self._meter = Meter(self._pool.capacity)
        self._finished = 0
        self._preemptions = 0
        self._steps = 0
        self._running = threading.Lock()
        self._aborts: set[str] = set()
        self._aborts_lock = threading.Lock()

    @classmethod
    def load(cls, source: str, config: EngineConfig | None = None) -> Engine:
        """Loads a model as `config` says (see `engine.checkpoints.load_model` for `source`) and makes an engine for it."""
        from engine.checkpoints import load_model

        config = config or EngineConfig()
        return cls(load_model(source, dtype=config.dtype, device=config.device), config)

    def run(self, requests: Iterable[Request | None]) -> Iterator[Result]:
        """Yields every request's result as it finishes, in no particular order.

        `requests` is read only as far as the engine has use for it: what can run plus `config.look_ahead`. A `None` in it
        means that there is nothing right now: running requests go on, and it is asked again after the next step. Closing the
        generator drops what is unfinished. Raises RuntimeError if a run is under way already.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("this engine is already running; one engine serves one run at a time")
        source = iter(requests)
        try:
            open_ended = True
            while open_ended or self._live:
                rejected: list[Result] = []
                if open_ended:
                    open_ended = self._pull(source, rejected)
                yield from rejected
                yield from self._take_aborts()
                if self._live:
                    yield from self._step()
                elif open_ended:
                    time.sleep(_IDLE_SECONDS)
        finally:
            for live in list(self._live.values()):
                self._remove(live, complete=False)
            self._recorder.flush()
            self._running.release()

    def abort(self, ids: Iterable[str]) -> None:
        """Ends these requests before the next step, with FinishReason.ABORTED. Ids that are not in the engine are ignored."""
        with self._aborts_lock:
            self._aborts.update(ids)

    def observe_finished(self, template: str | None, tokens: list[int]) -> None:
        """Lets an answer that was finished elsewhere (before a restart, by another worker) draft for its siblings.

        tokens: the last few of its prompt and the answer, as a `Result` has them. Not while `run` is being driven by another thread.
        """
        self._speculator.observe_finished(template, tokens)

    def stats(self) -> EngineStats:
        """How things stood after the last step."""
        return self._meter.stats

    def _pull(self, source: Iterator[Request | None], rejected: list[Result]) -> bool:
        """Fills up to the look-ahead. Returns whether the source may still have more."""
        while len(self._live) < self.limits.max_sequences + self.config.look_ahead:
            try:
                request = next(source)
            except StopIteration:
                return False
            if request is None:
                self._recorder.awaited()
                return True
            try:
                drafter = self.drafters.resolve(request.drafter)
                self._check_vocabulary(request)
                sequence = self._scheduler.add(request)
            except (UnfitRequestError, UnknownDrafterError) as error:
                self._finished += 1
                ledger = TokenLedger(prompt=len(request.prompt_token_ids))
                rejected.append(Result(request.id, (), "", FinishReason.ERROR, ledger, error=str(error), choice=request.choice))
                continue
            self._recorder.pulled(sequence)
            watch = StopWatch(sequence, self.tokenizer, self.spec.eos_token_ids)
            self._rules.enter(sequence, watch.end_tokens)
            self._logprobs.enter(sequence)
            self._live[sequence.serial] = _Live(sequence, watch, drafter)
        return True

    def _check_vocabulary(self, request: Request) -> None:
        sampling = request.sampling
        named = {
            "prompt": request.prompt_token_ids,
            "logit_bias": tuple(token for token, _ in sampling.logit_bias),
            "stop_token_ids": sampling.stop_token_ids,
        }
        for name, tokens in named.items():
            low, high = min(tokens, default=0), max(tokens, default=0)
            if low < 0 or high >= self.spec.vocab_size:
                wrong = low if low < 0 else high
                raise UnfitRequestError(f"{name} token {wrong} is outside the model's vocabulary of {self.spec.vocab_size}")

    def _take_aborts(self) -> list[Result]:
        if not self._aborts:
            return []
        with self._aborts_lock:
            ids, self._aborts = self._aborts, set()
        hit = [live for live in self._live.values() if live.sequence.request.id in ids]
        return [self._close(live, FinishReason.ABORTED) for live in hit]

    def _step(self) -> list[Result]:
        """Schedule, draft, run, verify, book."""
        self._steps += 1
        if self._steps % _RECLAIM_EVERY == 0:
            self._reclaim()
        plan = self._scheduler.schedule()
        results = [self._close(self._live[sequence.serial], FinishReason.ERROR, self._outgrown(sequence)) for sequence in plan.unfit]
        if plan.num_tokens == 0:
            if not results:
                raise RuntimeError(f"the scheduler found nothing to run for {len(self._live)} requests")
            return results
        for sequence in plan.admitted:
            self._enter(sequence)
        proposal = Proposal.empty(len(plan.decoding))
        try:
            proposal = self._draft(plan)
            work = Work.of(plan, proposal, self._scheduler.tables.rows, self._pool.block_size)
            outcome = self._execute(work)
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
            return results + self._give_up(plan, proposal, str(error))
        return results + self._book(work, outcome)

    def _give_up(self, plan: StepPlan, proposal: Proposal, reason: str) -> list[Result]:
        """Memory for a step was refused: smaller steps from now on, and whoever has no room in them starts again later."""
        if self.spec.device.type == "cuda":
            torch.cuda.empty_cache()
        num_tokens = plan.num_tokens + int(proposal.chosen.sum())
        if num_tokens < 2:
            words = reason.partition("\n")[0]
            closing = [self._live[chunk.sequence.serial] for chunk in plan.decoding + plan.prefill]
            return [
                self._close(live, FinishReason.ERROR, f"there is not enough memory for a step of one token: {words}") for live in closing
            ]
        preempted = self._scheduler.give_up(plan, num_tokens)
        self._preemptions += preempted + plan.preempted
        _log.warning("a step of %d tokens got no memory: steps hold %d now", num_tokens, self._scheduler.max_step_tokens)
        return []

    def _reclaim(self) -> None:
        """Memory of drafters that do not pay goes to the KV cache, once none of them is left."""
        if self._speculator.let_go() and not self.drafters.bytes_per_token and (spare := self.limits.max_blocks - self._pool.num_blocks):
            self._pool.grow(spare)
            self._meter.resize(self._pool.capacity)

    def _enter(self, sequence: Sequence) -> None:
        self._table.enter(sequence)
        if (name := self._live[sequence.serial].drafter) is not None:
            self._speculator.start(name, sequence.slot)

    def _draft(self, plan: StepPlan) -> Proposal:
        sequences = [chunk.sequence for chunk in plan.decoding]
        names = [self._live[sequence.serial].drafter for sequence in sequences]
        budget = self._scheduler.max_step_tokens - plan.num_tokens
        proposal = self._speculator.propose(sequences, names, step=self._steps, prefill=plan.prefill_tokens, budget=budget)
        spare = self._runner.spare(plan.num_tokens + int(proposal.chosen.sum()), len(plan.decoding) + len(plan.prefill))
        proposal.chosen[:] = fill(proposal.chosen, proposal.drafted, min(spare, budget - int(proposal.chosen.sum())))
        for row in np.flatnonzero(proposal.chosen):
            proposal.chosen[row] = self._scheduler.grant_drafts(sequences[row], int(proposal.chosen[row]))
        return proposal

    def _execute(self, work: Work) -> Outcome:
        """The forward and the verdict on its rows: what a device does in a step, timed until the host has the tokens."""
        started = time.perf_counter_ns()
        output = self._runner.run(work.step, self._speculator.taps)
        logits, kept = self._logprobs.keep(output.logits, work)
        self._rules.apply(logits, work)
        verdict = verify(logits, work.rows(self._table), self._steps, work.row_probabilities(logits))
        elapsed = time.perf_counter_ns() - started
        return Outcome.of(work, verdict, output.taps, elapsed, kept)

    def _book(self, work: Work, outcome: Outcome) -> list[Result]:
        """Confirms tokens, ends what has ended, and tells everyone who learns from the step."""
        step, chunks, accepted = work.step, work.chunks, outcome.accepted
        estimate(work, outcome, self._speculator.cost)  # before the model has seen this step
        self._recorder.ran(work, outcome, self._speculator.cost)
        decoding = [chunk.sequence for chunk in chunks[: work.num_decoding]]
        self._speculator.learn_cost(work.load, outcome.nanoseconds * 1e-9)
        self._speculator.settle(work.proposal, decoding, accepted[: work.num_decoding], outcome.following[: work.num_decoding])
        if outcome.taps:
            self._speculator.observe(Progress(chunks, step.query_start, work.counts + accepted, step.positions, step.slots, outcome.taps))
        charge(work, outcome)
        self._logprobs.book(work, outcome)
        results = []
        generated = 0
        for index, chunk in enumerate(chunks):
            result, kept = self._confirm(work, outcome, index, chunk)
            generated += kept
            if result is not None:
                results.append(result)
        self._measure(work, outcome, generated)
        return results

    def _confirm(self, work: Work, outcome: Outcome, index: int, chunk: Chunk) -> tuple[Result | None, int]:
        """Adds what one chunk brought to its sequence. Returns the result if it ended, and how many tokens it gained."""
        if not chunk.samples:
            self._scheduler.complete(chunk, _NOTHING, chunk.count)
            return None, 0
        sequence = chunk.sequence
        live = self._live[sequence.serial]
        if not outcome.finite[index]:
            return self._close(live, FinishReason.ERROR, "the model's output for this request is not a number (NaN or infinite logits)"), 0
        accepted = int(outcome.accepted[index])
        tokens = [*work.drafts[index][:accepted].tolist(), int(outcome.following[index])]
        kept, reason = live.watch.scan(tokens, sequence.room)
        ledger = sequence.ledger
        ledger.sampled += len(tokens)
        ledger.generated += kept
        ledger.dropped += len(tokens) - kept
        ledger.steps += 1
        self._scheduler.complete(chunk, np.array(tokens[:kept], np.int64), chunk.count + min(accepted, kept))
        return None if reason is None else self._close(live, reason), kept

    def _close(self, live: _Live, reason: FinishReason, error: str | None = None) -> Result:
        sequence = live.sequence
        answered = reason in (FinishReason.STOP, FinishReason.LENGTH)
        self._recorder.ended(sequence, reason)
        prompt_logprobs, logprobs = self._logprobs.leave(sequence)
        self._remove(live, complete=answered)
        self._finished += 1
        return Result(
            id=sequence.request.id,
            token_ids=tuple(sequence.output.tolist()) if answered else (),
            text=live.watch.text(sequence) if answered else "",
            finish_reason=reason,
            ledger=sequence.ledger,
            drafter=live.drafter,
            error=error,
            choice=sequence.request.choice,
            logprobs=logprobs if answered else (),
            prompt_logprobs=prompt_logprobs if answered else (),
        )

    def _remove(self, live: _Live, *, complete: bool) -> None:
        del self._live[live.sequence.serial]
        self._scheduler.finish(live.sequence, complete=complete)
        self._rules.leave(live.sequence)
        self._logprobs.leave(live.sequence)
        if live.drafter is not None:
            self._speculator.finish(live.drafter, live.sequence, complete=complete)

    def _outgrown(self, sequence: Sequence) -> str:
        return (
            f"prompt and answer have reached {sequence.num_tokens} tokens, and this worker's whole KV cache holds "
            f"{self._pool.capacity * self._pool.block_size}; lower max_tokens or give the worker more memory for KV"
        )

    def _measure(self, work: Work, outcome: Outcome, generated: int) -> None:
        proposal = work.proposal
        sampled = outcome.accepted[work.step.row_counts > 0]
        self._preemptions += work.preempted
        self._meter.add(
            time.monotonic(),
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_held=self._pool.num_held,
            finished=self._finished,
            preemptions=self._preemptions,
            steps=1,
            step_tokens=work.step.num_tokens,
            sampled=int(sampled.sum()) + len(sampled),
            sampling_steps=len(sampled),
            generated=generated,
            drafted=int(proposal.drafted.sum()),
            verified=int(proposal.chosen.sum()),
            accepted=int(outcome.accepted.sum()),
            busy_ns=outcome.nanoseconds + int(proposal.nanoseconds.sum()),
        )
