"""The engine: requests in, results out, one packed step after the other."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.admission import check_vocabulary, constraint_of
from engine.booking import Booking
from engine.config import EngineConfig, derive_limits
from engine.device_decoding import DeviceDecoding
from engine.device_rules import DeviceRules
from engine.drafter_changes import DrafterChanges
from engine.drafters.base import Host
from engine.drafters.builtin import OFF
from engine.drafters.registry import Catalogue, UnknownDrafterError
from engine.flight import DeviceClock, Flight, HostClock
from engine.grammars import Compiler, GrammarError
from engine.grammars.vocabulary import Vocabulary
from engine.graphs import GraphRunner
from engine.kv_blocks import BlockPool
from engine.kv_scales import make_pool
from engine.lab.recorder import Recorder
from engine.launcher import Launcher, make_judge
from engine.live_requests import LiveRequests
from engine.logit_rules import LogitRules
from engine.logprobs import Logprobs
from engine.memory import free_bytes, is_exhausted
from engine.profile import measure_steps, warm_up
from engine.row_table import RowTable
from engine.runner import make_runner
from engine.scheduler import Scheduler, StepPlan, UnfitRequestError
from engine.speculation.cost_model import CostModel, Load, best_batch, best_chunk
from engine.speculation.judge import DeviceJudge
from engine.speculation.proposal import Proposal
from engine.speculation.speculator import Speculator
from engine.stats import EngineStats, Meter
from engine.stopping import StopWatch
from engine.tiers import fill
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, Request, Result
from engine.work import Work
from kernels import pages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from engine.checkpoints import LoadedModel
    from engine.device_decoding import DeviceFlight
    from engine.profile import Profiles
    from engine.sequence import Sequence

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.005
_RECLAIM_EVERY = 64
_FIRST_TOKENS = 192
"""Tokens a sequence that the KV cache has memory for before the first request."""


class Engine:
    """Runs one loaded model. `run` is driven by one thread; `abort` and `stats` may be called from any.

    On a GPU a step without drafts is launched before the one before it is read: the device has the tokens that it starts from, and the
    host prepares it meanwhile. What was found to have ended runs one step too many, whose token is dropped. The texts are the same.
    """

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
        kv = make_pool(loaded.model, config, self.limits)
        pages.keep_freed()
        first_blocks = min(self.limits.max_sequences * _FIRST_TOKENS // config.block_size, self.limits.num_blocks // 4)
        memory = threading.Thread(target=kv.take_pages, args=(first_blocks,), daemon=True)
        memory.start()  # while kernels are compiled
        self._runner = make_runner(loaded.model, kv, self.limits.max_sequences)
        judge = make_judge(self._runner)
        self._clock = DeviceClock(spec.device) if spec.device.type == "cuda" else HostClock()
        self._flight: Flight | DeviceFlight | None = None
        self._pool = BlockPool(self.limits.num_blocks, config.block_size, share_prefixes=config.share_prefixes)
        self._scheduler = Scheduler(
            self._pool,
            max_sequences=self.limits.max_sequences,
            max_step_tokens=self.limits.max_step_tokens,
            max_positions=spec.max_positions,
            fixed_drafts=self.limits.fixed_drafts,
        )
        with nullcontext() if profiles is None else profiles.tuned(spec.device):
            warm_up(self._runner, self.limits.max_step_tokens)
        if isinstance(judge, DeviceJudge):
            judge.warm_up(spec.vocab_size)
        cost = CostModel(self.limits.max_step_tokens)
        self.profile_reused = False
        points: list[tuple[Load, float]] = []
        # Without drafts it is for the batch size alone, which is not worth a measurement that nobody keeps. A trace says what this machine
        # could do, whoever drafted.
        if config.drafter != OFF or config.trace is not None or profiles is not None:
            sizes = (self.limits.max_sequences, self.limits.max_step_tokens)
            memory.join()
            points, self.profile_reused = (
                profiles.steps(self._runner, spec, *sizes) if profiles is not None else (measure_steps(self._runner, *sizes), False)
            )
            cost.profile(points)
            self._scheduler.batch = best_batch(cost, self.limits.max_sequences)
            self._scheduler.chunk = best_chunk(cost, self._scheduler.chunk)
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
                first_blocks=first_blocks,
            )
        )
        # Where drafts are made inside steps, what they take is not known apart from these.
        records = None if profiles is None or isinstance(self._runner, GraphRunner) else profiles.drafters(spec, self.drafters.stamp)
        self._speculator = Speculator(
            config.max_draft_tokens,
            self.limits.max_sequences,
            cost,
            self.drafters,
            fixed_drafts=config.fixed_drafts,
            records=records,
        )
        adapting = None
        if config.adapt:
            from engine.training.adapt import adapter_for

            adapting = adapter_for(self.drafters.made(), loaded.model.frozen(), seed=config.seed or 0)
        self.foretell = self._speculator.foretell  # for those who judge it
        self._changes = DrafterChanges(self.drafters, self._speculator, adapting)
        self._recorder = Recorder.of(config, spec, self.limits, points, self.drafters, records)
        self._table = RowTable(self.limits.max_sequences, entropy)
        self._device = (
            DeviceDecoding(self._runner, self._scheduler, self._speculator, self._table) if isinstance(self._runner, GraphRunner) else None
        )
        late = self._runner.latest is not None
        self._rules: DeviceRules | LogitRules = DeviceRules(spec.vocab_size, spec.device) if late else LogitRules()
        self._logprobs = Logprobs(late=late)
        tokenizer = self.tokenizer
        self.grammars = Compiler(lambda: Vocabulary.of(tokenizer, spec.vocab_size, spec.eos_token_ids))
        """Compiles what requests want their answers to look like; who submits a grammar early finds it ready."""
        self._meter = Meter(self._pool.capacity)
        self._requests = LiveRequests(self._scheduler, self._speculator, self._rules, self._logprobs, self._recorder, self._device)
        self._launcher = Launcher(
            self._runner, judge, self._clock, self._table, self._speculator, self._rules, self._logprobs, self._requests
        )
        self._booking = Booking(
            self._requests,
            self._scheduler,
            self._speculator,
            self._rules,
            self._logprobs,
            self._recorder,
            self._meter,
            ways=None if self._device is None else self._device.ways,
        )
        self._steps = 0
        self._running = threading.Lock()
        self._aborts: set[str] = set()
        self._aborts_lock = threading.Lock()
        memory.join()

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
            self._changes.look()
            self._booking.begin()
            open_ended = True
            while open_ended or self._requests or self._flight is not None:
                rejected: list[Result] = []
                if open_ended:
                    open_ended = self._pull(source, rejected)
                yield from rejected
                yield from self._take_aborts()
                if self._requests:
                    yield from self._step()
                elif self._flight is not None:
                    yield from self._land()
                elif open_ended:
                    time.sleep(_IDLE_SECONDS)
        finally:
            self._flight = None
            if self._device is not None:
                self._device.leave()
            self._requests.drop()
            self._recorder.flush()
            self._speculator.keep()
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
        while len(self._requests) < self.limits.max_sequences + self.config.look_ahead:
            try:
                request = next(source)
            except StopIteration:
                return False
            if request is None:
                self._recorder.awaited()
                return True
            try:
                drafter = self.drafters.resolve(request.drafter)
                check_vocabulary(request, self.spec.vocab_size)
                constraint = constraint_of(request, self.spec, self.grammars, self.tokenizer)
                sequence = self._scheduler.add(request)
            except (UnfitRequestError, UnknownDrafterError, GrammarError) as error:
                rejected.append(self._requests.refuse(request, str(error)))
                continue
            self._requests.enter(sequence, StopWatch(sequence, self.tokenizer, self.spec.eos_token_ids), drafter, constraint)
        return True

    def _take_aborts(self) -> list[Result]:
        if not self._aborts:
            return []
        with self._aborts_lock:
            ids, self._aborts = self._aborts, set()
        hit = [live for live in self._requests if live.sequence.request.id in ids]
        return [result for live in hit for result in self._requests.close(live, FinishReason.ABORTED)]

    def _step(self) -> list[Result]:
        """Schedule, draft, run, verify, book; or all but the last, and book the step before this one."""
        self._steps += 1
        if self._steps % _RECLAIM_EVERY == 0:
            self._reclaim()
            self._changes.learn()
            self._changes.look()
        results, launched = self._step_on_device()
        if launched:
            return results
        results += [] if self._may_run_ahead() else self._land()
        plan = self._scheduler.schedule()
        for sequence in plan.unfit:
            results += self._requests.close(self._requests[sequence], FinishReason.ERROR, self._outgrown(sequence))
        if plan.num_tokens == 0:
            if self._flight is not None:
                return results + self._land()
            if self._requests and not results:
                raise RuntimeError(f"the scheduler found nothing to run for {len(self._requests)} requests")
            return results
        for sequence in plan.admitted:
            self._enter(sequence)
        running = self._scheduler.running
        crowd = min(len(running) + len(self._scheduler.waiting), self._scheduler.batch)
        self._speculator.foresee(crowd, running, self._scheduler.answers())
        proposal = Proposal.empty(len(plan.decoding))
        try:
            if self._flight is None:
                proposal = self._draft(plan)
            work = Work.of(plan, proposal, self._scheduler.tables.rows, self._pool.block_size)
            flight = self._launcher.launch(work, self._steps)
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
            results += self._land()
            return results + self._give_up(plan, proposal, str(error))
        before, self._flight = self._flight, flight
        if not flight.promised:
            return results + self._land()
        for chunk in flight.work.chunks:
            self._scheduler.promise(chunk)
        return results if before is None else results + self._booking.book(before)

    def _step_on_device(self) -> tuple[list[Result], bool]:
        """Launches the next step where drafts are made on the device, if it is to be made there. Results, and whether it was launched."""
        device, results = self._device, list[Result]()
        if device is None:
            return results, False
        if device.running and not device.stays(list(self._requests)):
            results += self._land()
            device.leave()
        if not device.running and device.wanted(list(self._requests)):
            results += self._land()
            device.enter(list(self._requests))
        if not device.running:
            return results, False
        try:
            flight = device.launch(self._steps, self._clock)
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
            results += self._land()
            device.leave(failed=True)
            return results, False
        if flight is None:
            results += self._land()
            device.leave()
            return results, False
        before, self._flight = self._flight, flight
        return results if before is None else results + self._booking.book(before), True

    def _may_run_ahead(self) -> bool:
        """Whether the next step can be launched while the last one is in flight: nothing in it hangs on a token that is not known yet."""
        flight = self._flight
        if not isinstance(flight, Flight):
            return False
        if any(live.sequence.promised and self._rules.constraint(live.sequence) is not None for live in flight.lives):
            return False
        if not self._scheduler.grows_freely():  # who is preempted starts again from its text
            return False
        going = [sequence for sequence in self._scheduler.running if sequence.decoding and sequence.room > 0]
        names = [self._requests[sequence].drafter for sequence in going]
        prefill = len(flight.work.step.token_ids) - flight.work.num_decoding
        return self._speculator.idle(going, names, step=self._steps, prefill=prefill, remaining=self._scheduler.remaining(going))

    def _give_up(self, plan: StepPlan, proposal: Proposal, reason: str) -> list[Result]:
        """Memory for a step was refused: smaller steps from now on, and whoever has no room in them starts again later."""
        if self.spec.device.type == "cuda":
            torch.cuda.empty_cache()
        num_tokens = plan.num_tokens + int(proposal.chosen.sum())
        if num_tokens < 2:
            words = reason.partition("\n")[0]
            message = f"there is not enough memory for a step of one token: {words}"
            closing = [self._requests[chunk.sequence] for chunk in plan.decoding + plan.prefill if chunk.sequence in self._requests]
            return [result for live in closing for result in self._requests.close(live, FinishReason.ERROR, message)]
        preempted = self._scheduler.give_up(plan, num_tokens)
        self._booking.preemptions += preempted + plan.preempted
        _log.warning("a step of %d tokens got no memory: steps hold %d now", num_tokens, self._scheduler.max_step_tokens)
        return []

    def _reclaim(self) -> None:
        """Memory of drafters that do not pay goes to the KV cache, once none of them is left."""
        if self._speculator.let_go() and not self.drafters.bytes_per_token and (spare := self.limits.max_blocks - self._pool.num_blocks):
            self._pool.grow(spare)
            self._meter.resize(self._pool.capacity)

    def _enter(self, sequence: Sequence) -> None:
        self._table.enter(sequence)
        if (name := self._requests[sequence].drafter) is not None:
            self._speculator.start(name, sequence.slot)

    def _draft(self, plan: StepPlan) -> Proposal:
        sequences = [chunk.sequence for chunk in plan.decoding]
        names = [self._requests[sequence].drafter for sequence in sequences]
        budget = self._scheduler.max_step_tokens - plan.num_tokens
        proposal = self._speculator.propose(
            sequences,
            names,
            step=self._steps,
            prefill=plan.prefill_tokens,
            budget=budget,
            remaining=self._scheduler.remaining(sequences),
            constraints=self._rules.constraints(sequences),
        )
        spare = self._runner.spare(plan.num_tokens + int(proposal.chosen.sum()), len(plan.decoding) + len(plan.prefill))
        proposal.chosen[:] = fill(proposal.chosen, proposal.drafted, min(spare, budget - int(proposal.chosen.sum())))
        for row in np.flatnonzero(proposal.chosen):
            proposal.chosen[row] = self._scheduler.grant_drafts(sequences[row], int(proposal.chosen[row]))
        return proposal

    def _land(self) -> list[Result]:
        """Reads the step that is in flight, if any."""
        flight, self._flight = self._flight, None
        return [] if flight is None else self._booking.book(flight)

    def _outgrown(self, sequence: Sequence) -> str:
        return (
            f"prompt and answer have reached {sequence.num_tokens} tokens, and this worker's whole KV cache holds "
            f"{self._pool.capacity * self._pool.block_size}; lower max_tokens or give the worker more memory for KV"
        )
