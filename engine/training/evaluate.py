"""How far drafts get: acceptance length by domain, and the confidence of every block beside what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from engine.config import EngineConfig
from engine.drafters.builtin import TEXT_DRAFTERS
from engine.engine import Engine
from engine.training.answers import encode
from engine.types import Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from engine.checkpoints import LoadedModel
    from engine.drafters.base import DraftBatch, Drafter, Drafts, Progress
    from engine.profile import Profiles
    from engine.sequence import Sequence as EngineSequence
    from engine.training.prompts import Prompt

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


@runtime_checkable
class Scored(Protocol):
    """A drafter that also gives the evidence for its drafts, float64 [S, D, 2]; see `engine.drafters.parts.confidence.scaled`."""

    def propose_scored(self, batch: DraftBatch) -> tuple[Drafts, Floats]: ...


@dataclass(slots=True)
class Watched:
    """Passes everything on to `drafter`, and holds each block of `width` drafts against the text that came of it.

    foretell: what the engine makes of drafts at this moment, see `TrackRecord.survival`: of sequences' slots [S] and bins [S, D].
    """

    drafter: Drafter
    width: int
    foretell: Callable[[Ints, Ints], Floats]
    evidence: list[Floats] = field(default_factory=list)
    foretold: list[Floats] = field(default_factory=list)
    stood: list[Floats] = field(default_factory=list)
    _pending: dict[int, list[tuple[int, Ints, Floats, Floats]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name, self.taps, self.prior = self.drafter.name, self.drafter.taps, self.drafter.prior

    name: str = ""
    taps: tuple[int, ...] = ()
    prior: Floats = field(default_factory=lambda: np.empty(0))

    def propose(self, batch: DraftBatch) -> Drafts:
        if not isinstance(self.drafter, Scored):
            return self.drafter.propose(batch)
        drafts, evidence = self.drafter.propose_scored(batch)
        slots = np.array([sequence.slot for sequence in batch.sequences], np.int64)
        foretold = self.foretell(slots, drafts.bins)
        for row, sequence in enumerate(batch.sequences):
            if drafts.lengths[row] >= self.width:
                tokens = drafts.token_ids[row, : self.width].copy()
                block = (sequence.num_tokens, tokens, evidence[row, : self.width].copy(), foretold[row, : self.width])
                self._pending.setdefault(sequence.serial, []).append(block)
        return drafts

    def observe(self, progress: Progress) -> None:
        self.drafter.observe(progress)

    def finish(self, sequence: EngineSequence, *, complete: bool) -> None:
        for start, tokens, evidence, foretold in self._pending.pop(sequence.serial, []):
            text = sequence.tokens[start : start + self.width]
            if complete and len(text) == self.width:
                self.evidence.append(evidence)
                self.foretold.append(foretold)
                self.stood.append(np.cumprod(text == tokens).astype(np.float64))
        self.drafter.finish(sequence, complete=complete)

    def blocks(self) -> tuple[Floats, Floats, Floats]:
        """(evidence [N, width, 2], what was foretold [N, width], whether drafts 1..k stood [N, width]), float64."""
        if not self.stood:
            return no_blocks(self.width)
        return np.stack(self.evidence), np.stack(self.foretold), np.stack(self.stood)


def no_blocks(width: int) -> tuple[Floats, Floats, Floats]:
    return np.zeros((0, width, 2)), np.zeros((0, width)), np.zeros((0, width))


@dataclass(frozen=True, slots=True)
class Measured:
    """tokens, steps: float64 [requests] of each domain, what the target said and in how many steps; requests in the prompts' order. The
    first token, which comes of the prompt's own step and never of a draft, counts for neither.

    evidence, foretold, stood: of all blocks, see `Watched.blocks`; empty for drafters that give no evidence.
    """

    tokens: dict[str, Floats]
    steps: dict[str, Floats]
    evidence: Floats
    foretold: Floats
    stood: Floats

    @property
    def acceptance(self) -> dict[str, float]:
        """Tokens per step, the bonus token included, by domain, and `macro`, the mean of the domains."""
        went_on = [domain for domain in sorted(self.tokens) if self.steps[domain].any()]
        found = {domain: float(self.tokens[domain].sum() / self.steps[domain].sum()) for domain in went_on}
        return found | ({"macro": sum(found.values()) / len(found)} if found else {})

    def intervals(self, draws: int = 2000) -> dict[str, tuple[float, float]]:
        """95% bootstrap intervals of `acceptance`; a request is drawn as a whole."""
        rng = np.random.default_rng(0)
        samples: dict[str, Floats] = {}
        for domain in [name for name in self.acceptance if name != "macro"]:
            drawn = rng.integers(0, len(self.tokens[domain]), (draws, len(self.tokens[domain])))
            samples[domain] = self.tokens[domain][drawn].sum(1) / np.maximum(self.steps[domain][drawn].sum(1), 1.0)
        if samples:
            samples["macro"] = np.mean(list(samples.values()), axis=0)
        return {name: (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))) for name, values in samples.items()}


def ratio(ours: Measured, theirs: Measured, draws: int = 2000) -> tuple[float, float, float]:
    """Of macro acceptance lengths on the same prompts, with its 95% bootstrap interval: a request is drawn for both alike.

    Raises ValueError where the prompts were not the same.
    """
    rng = np.random.default_rng(0)
    sums: list[list[Floats]] = [[], []]
    for domain in sorted(ours.tokens):
        count = len(ours.tokens[domain])
        if domain not in theirs.tokens or len(theirs.tokens[domain]) != count or len(ours.tokens) != len(theirs.tokens):
            raise ValueError("the two were not measured on the same prompts")
        drawn = rng.integers(0, count, (draws, count))
        for place, one in enumerate((ours, theirs)):
            sums[place].append(one.tokens[domain][drawn].sum(1) / one.steps[domain][drawn].sum(1))
    ratios = np.mean(sums[0], axis=0) / np.mean(sums[1], axis=0)
    return (
        ours.acceptance["macro"] / theirs.acceptance["macro"],
        float(np.quantile(ratios, 0.025)),
        float(np.quantile(ratios, 0.975)),
    )


def measure(
    loaded: LoadedModel,
    drafter: str,
    prompts: Sequence[Prompt],
    *,
    temperature: float = 0.0,
    drafts: int = 7,
    max_tokens: int = 256,
    max_sequences: int | None = None,
    profiles: Profiles | None = None,
    tick: Callable[[int, int], None] = lambda done, of: None,  # noqa: ARG005 - names for the reader
) -> Measured:
    """Runs the prompts with every request drafting `drafts` tokens a step, whatever that costs, so that figures compare.

    profiles: where this machine's step times are kept; measured anew where None. tick: called with how many requests are answered, and of
    how many.
    """
    tick(0, len(prompts))
    config = EngineConfig(drafter=drafter, fixed_drafts=drafts, max_draft_tokens=drafts, max_sequences=max_sequences, seed=0)
    engine = Engine(loaded, config, profiles)
    name = engine.drafters.resolve("auto")
    watched: list[Watched] = []

    def around(made: Drafter) -> Drafter:
        watched.append(Watched(made, drafts, partial(engine.foretell, made.name)))
        return watched[0]

    if name is not None and name not in TEXT_DRAFTERS and name in engine.drafters.ready:
        engine.drafters.watch(name, around)
    domains: dict[str, str] = {}
    requests = []
    for number, prompt in enumerate(prompts):
        tokens = encode(engine.tokenizer, prompt.text)
        room = engine.spec.max_positions - 1 - len(tokens)
        if room > 0:
            params = SamplingParams(max_tokens=min(max_tokens, room), temperature=temperature)
            domains[str(number)] = prompt.domain
            requests.append(Request(str(number), tokens, params))
    ended: dict[str, tuple[int, int]] = {}
    for count, result in enumerate(engine.run(iter(requests)), 1):
        tick(count, len(requests))
        if result.ledger.steps:
            ended[result.id] = result.ledger.sampled - 1, result.ledger.steps - 1
    made: dict[str, list[tuple[int, int]]] = {}
    for request in requests:
        if request.id in ended:
            made.setdefault(domains[request.id], []).append(ended[request.id])
    blocks = watched[0].blocks() if watched else no_blocks(drafts)
    columns = {domain: np.array(rows, np.float64) for domain, rows in made.items()}
    sampled, walked = ({domain: rows[:, part] for domain, rows in columns.items()} for part in range(2))
    return Measured(sampled, walked, *blocks)
