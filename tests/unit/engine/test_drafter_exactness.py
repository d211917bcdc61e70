"""Whatever drafts, and however the portfolio chooses: greedy text is plain decoding's, sampled text has the target's distribution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.batch import TargetModel
from engine.config import EngineConfig
from engine.drafters import registry
from engine.drafters.base import DraftBatch, Drafts
from engine.drafters.dspark import DSparkDrafter
from engine.drafters.eagle3 import Eagle3Drafter
from engine.drafters.parts import frozen
from engine.drafters.sources import Source
from engine.engine import Engine
from engine.speculation import portfolio as portfolio_module
from engine.speculation import speculator as speculator_module
from engine.speculation.cost_model import CostModel
from engine.speculation.portfolio import Portfolio
from engine.speculation.speculator import Speculator
from engine.types import Request, SamplingParams
from tests.unit.engine.drafters.layouts import VOCAB, deepspec, eagle, write, zlab
from tests.unit.engine.drafting import jobs, run
from tests.unit.engine.models.tiny import make_hf, make_lean
from tests.unit.engine.test_exactness import Guesser, TableModel

pytestmark = pytest.mark.usefixtures("fixed_costs")


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return make_lean(make_hf("qwen3"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, target: TargetModel) -> Path:
    """One drafter of each kind. `packed` is a target's folder with two of them beside it."""
    root = tmp_path_factory.mktemp("drafters")
    write(root / "dspark", *deepspec(target))
    write(root / "rnn", *deepspec(target, "rnn"))
    write(root / "dflash", *zlab())
    write(root / "eagle3", *eagle("original"))
    for name in ("dspark", "eagle3"):
        (root / "packed" / "drafters").mkdir(parents=True, exist_ok=True)
        (root / "packed" / "drafters" / name).symlink_to(root / name)
    return root


@pytest.mark.parametrize("max_sequences", [1, 8])
@pytest.mark.parametrize("drafter", ["dspark", "rnn", "dflash", "eagle3", "auto"])
def test_greedy_text_is_plain_decodings(target: TargetModel, folders: Path, drafter: str, max_sequences: int) -> None:
    made = jobs(7)
    plain, _ = run(target, made, "off", max_sequences=max_sequences)
    directory = folders / "packed" if drafter == "auto" else None
    drafted, engine = run(target, made, drafter if directory else str(folders / drafter), directory, max_sequences=max_sequences)
    assert drafted == plain
    stats = engine.stats()
    assert stats.verified > 15
    assert stats.drafted >= stats.verified >= stats.accepted
    if drafter == "auto":
        assert engine.drafters.members == ("suffix", "dspark", "eagle3")
        assert engine.drafters.resolve("auto") == "portfolio"
        assert engine.drafters.resolve("eagle3") == "eagle3"


@pytest.mark.parametrize("drafter", ["dspark", "eagle3"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafters_in_eight_bits_leave_the_text_alone(
    target: TargetModel, folders: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, drafter: str
) -> None:
    made = jobs(7, temperature=temperature, seed=5)
    plain, _ = run(target, made, "off")
    monkeypatch.setattr(frozen, "_LARGE", 0)
    text, engine = run(target, made, str(folders / drafter), fixed_drafts=4)
    assert text == plain
    assert engine.stats().verified > 0


def test_another_block_is_drafted_only_where_a_whole_one_is_likely_to_stand(
    target: TargetModel, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    propose = DSparkDrafter.propose

    def counted(self: DSparkDrafter, batch: DraftBatch) -> Drafts:
        asked.append(int(batch.limits.max()))
        return propose(self, batch)

    monkeypatch.setattr(DSparkDrafter, "propose", counted)
    deepest = []
    for chance in (1.1, 0.0):
        monkeypatch.setattr(speculator_module, "_CHAIN", chance)
        asked.clear()
        run(target, jobs(3, max_tokens=20), str(folders / "dspark"), max_draft_tokens=12, max_sequences=1)
        deepest.append(max(asked))
    assert deepest[0] <= 5 < deepest[1]


@pytest.mark.parametrize("drafter", ["dspark", "auto"])
def test_seeded_text_is_plain_decodings(target: TargetModel, folders: Path, drafter: str) -> None:
    made = jobs(7, temperature=0.9, seed=5, top_p=0.95)
    plain, _ = run(target, made, "off")
    directory = folders / "packed" if drafter == "auto" else None
    drafted, _ = run(target, made, drafter if directory else str(folders / drafter), directory)
    assert drafted == plain


def test_preemption_and_shared_prefixes_leave_the_text_alone(target: TargetModel, folders: Path) -> None:
    made = jobs(12)
    plain, _ = run(target, made, "off")
    block = 4 * (2 * 4 * 2 * 8 + 2 * 2 * 2 * 8 + 48 + 2 * 2 * 8) * 4
    drafted, engine = run(target, made, "auto", folders / "packed", kv_bytes=16 * block)
    assert drafted == plain
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("drafter", ["dspark", "eagle3", "auto"])
def test_sampled_text_has_the_targets_distribution(
    target: TargetModel, folders: Path, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    """The third token, whose distribution is summed over all first and second ones that came before."""
    if drafter != "auto":  # alone, its choice is between it and nothing: random weights do not pay, and would not be seen at work
        always_wanted(monkeypatch)
    prompt, count = (5, 17, 60, 5), 2000
    made = [
        Request(str(number), prompt, SamplingParams(max_tokens=5 + number % 7, temperature=0.8, ignore_eos=True)) for number in range(count)
    ]
    directory = folders / "packed" if drafter == "auto" else None
    answers, engine = run(
        target, made, drafter if directory else str(folders / drafter), directory, max_sequences=64, max_step_tokens=256, max_draft_tokens=2
    )
    assert engine.stats().verified > 100
    assert engine.stats().accepted > 10
    starts = sorted({tokens[:2] for tokens in answers.values()})
    expected = np.zeros(VOCAB)
    chance = next_probabilities(target, [(*prompt, *start) for start in starts], 0.8)
    weight = dict.fromkeys(starts, 0)
    for tokens in answers.values():
        weight[tokens[:2]] += 1
    for start, row in zip(starts, chance, strict=True):
        expected += weight[start] * row
    assert chi_square(np.bincount([tokens[2] for tokens in answers.values()], minlength=VOCAB), expected) < 1.0
    first = next_probabilities(target, [prompt], 0.8)[0] * count
    assert chi_square(np.bincount([tokens[0] for tokens in answers.values()], minlength=VOCAB), first) < 1.0


def always_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Portfolio, "_gains", lambda self, member, slots, *_: np.ones(len(slots)))


def next_probabilities(target: TargetModel, texts: list[tuple[int, ...]], temperature: float) -> np.ndarray:
    from tests.unit.engine.models.tiny import Texts

    rows = []
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        length = len(part[0])
        blocks = np.arange(1, 1 + len(part) * -(-length // 4)).reshape(len(part), -1)
        made = Texts([torch.tensor(text) for text in part], blocks.astype(np.int32))
        logits = target.forward(made.step([(text, 0, length) for text in range(len(part))]), made.pool(target.spec)).logits
        rows.append((logits[length - 1 :: length] / temperature).softmax(-1).numpy())
    return np.concatenate(rows)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the value at p = 1e-4; cells with less than eight expected are joined."""
    small = expected < 8
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], max(expected[small].sum(), 1e-9))
    freedom = len(counts) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((counts - expected) ** 2 / expected).sum() / critical)


def test_a_drafter_that_does_not_pay_goes_and_its_memory_becomes_cache(
    monkeypatch: pytest.MonkeyPatch, target: TargetModel, folders: Path
) -> None:
    monkeypatch.setattr(portfolio_module, "_PATIENCE", 20)
    monkeypatch.setattr("engine.engine._RECLAIM_EVERY", 4)
    monkeypatch.setattr(Portfolio, "_worth", lambda self, member, slots, *_: np.zeros(len(slots)))
    made = jobs(12)
    plain, _ = run(target, made, "off")
    drafted, engine = run(target, made, "auto", folders / "packed", max_sequences=2, kv_bytes=100 << 10)
    assert drafted == plain
    assert engine.drafters.members == ("suffix",)
    assert engine.limits.max_blocks > engine.limits.num_blocks
    assert engine._pool.num_blocks == engine.limits.max_blocks
    assert engine.stats().kv_blocks == engine.limits.max_blocks - 1
    engine._pool.check()


@pytest.mark.parametrize("pressed", [False, True])
@pytest.mark.parametrize("kind", [DSparkDrafter, Eagle3Drafter])
def test_a_drafter_sees_nothing_in_a_crowd_and_drafts_again_when_it_is_over(
    target: TargetModel, folders: Path, monkeypatch: pytest.MonkeyPatch, kind: type[DSparkDrafter | Eagle3Drafter], pressed: bool
) -> None:
    """Its cache then holds what it saw of earlier texts in the same blocks, and gaps: no text may show it."""
    seen, missed, drafted = [], [], []

    def foresee(self: Speculator, count: int, *_: object) -> None:
        self._drafters.crowded = count > 3

    def watched(name: str, into: list[int]) -> None:
        wrapped = getattr(kind, name)

        def count(self: Any, given: Any) -> Any:
            into.append(len(given.sequences) if isinstance(given, DraftBatch) else len(given.chunks))
            return wrapped(self, given)

        monkeypatch.setattr(kind, name, count)

    always_wanted(monkeypatch)
    monkeypatch.setattr(Speculator, "foresee", foresee)
    for name, into in (("observe", seen), ("miss", missed), ("propose", drafted)):
        watched(name, into)
    short = jobs(12)
    last = [replace(request, sampling=replace(request.sampling, max_tokens=45), priority=-1) for request in short[:2]]
    made = [replace(request, id=str(n)) for n, request in enumerate([*short, *last])]
    limits = {"kv_bytes": 60 << 10} if pressed else {}
    plain, _ = run(target, made, "off", max_sequences=5)
    name = "dspark" if kind is DSparkDrafter else "eagle3"
    text, engine = run(target, made, str(folders / name), max_sequences=5, **limits)
    assert text == plain
    assert (engine.stats().preemptions > 0) == pressed
    assert len(seen) > 10
    assert len(missed) > 10
    assert max(seen) <= 3
    assert drafted
    assert max(drafted) <= 3


def test_a_drafter_knows_a_text_whose_beginning_was_copied(target: TargetModel, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompt parts from another inside a block, whose beginning the drafter saw once."""
    known, copied = [], []
    propose, copy = DSparkDrafter.propose, DSparkDrafter.copy

    def watched(self: DSparkDrafter, batch: DraftBatch) -> Drafts:
        known.extend(self.knows_from(sequence) for sequence in batch.sequences)
        return propose(self, batch)

    def counted(self: DSparkDrafter, sources: np.ndarray, targets: np.ndarray) -> None:
        copied.append(len(sources))
        copy(self, sources, targets)

    monkeypatch.setattr(DSparkDrafter, "propose", watched)
    monkeypatch.setattr(DSparkDrafter, "copy", counted)
    first, second = jobs(2)
    prompt = (*range(3, 9), 70)
    alike = [replace(first, prompt_token_ids=(*prompt, 80, 81)), replace(second, prompt_token_ids=(*prompt, 90, 91, 92))]
    text, _ = run(target, alike, str(folders / "dspark"), fixed_drafts=4, max_sequences=1)
    assert text == run(target, alike, "off", share_prefixes=False)[0]
    assert copied == [3], "of seven common tokens four are a whole block"
    assert len(known) > 4
    assert set(known) == {0}


def test_finished_answers_from_elsewhere_draft_for_their_siblings(target: TargetModel) -> None:
    request = jobs(1, max_tokens=25)[0]
    answers, _ = run(target, [request], "off")
    engine = run(target, [], "suffix")[1]
    engine.observe_finished(None, [*request.prompt_token_ids[-16:], *answers["0"]])
    [result] = engine.run(iter([request]))
    assert result.token_ids == answers["0"]
    assert engine.stats().accepted > 15


# --- the portfolio's choice -----------------------------------------------------------------------------------------------------

A, B, C, D = range(4)


class Hopeful(Guesser):
    """After C it draws A or B evenly; after A it is right, after B wrong, and its bins know that."""

    guess = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    prior = np.array([0.8, 0.98, 0.02, 0.8, 0.8])
    shift = 0

    def propose(self, batch: Any) -> Any:
        return super().propose(DraftBatch(batch.sequences, batch.limits, batch.step * 2 + self.shift))


class Other(Hopeful):
    shift = 1


def most_confident(
    self: Speculator, choice: Any, asked: str, rows: Any, sequences: Any, limits: Any, step: int, proposal: Any, *_: Any
) -> None:
    """The mutant: everybody draws, and the drafts that look best are kept."""
    asked = {name: self._ask(name, rows, sequences, limits, step, proposal) for name in self._choices.portfolio.neural}
    looks = {name: self._survival(name, rows, drafts, sequences).sum() for name, drafts in asked.items()}
    best = max(looks, key=lambda name: looks[name])
    self._take(best, rows, asked[best], sequences, proposal)


def share_of_a(monkeypatch: pytest.MonkeyPatch) -> tuple[float, Engine]:
    table = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.7, 0.3, 0.0, 0.0], [0.7, 0.3, 0.0, 0.0]])
    sources = [Source("hopeful", "test", lambda host: Hopeful()), Source("other", "test", lambda host: Other())]
    monkeypatch.setattr(registry, "find_automatic", lambda directory, spec: sources)
    monkeypatch.setattr(CostModel, "curve", lambda self, tokens: 1.0 + 0.01 * np.asarray(tokens))
    config = EngineConfig(kv_bytes=4 << 20, max_sequences=1, max_step_tokens=16, drafter="auto", max_draft_tokens=2, seed=5)
    made = Engine(TableModel(table), config)
    [result] = made.run(iter([Request("x", (C,), SamplingParams(max_tokens=2000))]))
    text = np.array(result.token_ids)
    return float((text[1:][text[:-1] == C] == A).mean()), made


def test_a_portfolio_that_picks_the_most_confident_realised_draft_is_biased_and_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # A lookup in this text would win every choice; without its promises the neural drafters draw.
    choose = Portfolio.choose
    monkeypatch.setattr(
        Portfolio, "choose", lambda self, slots, kinds, lookup, rate, *_: choose(self, slots, kinds, lookup * 0.0, rate * 0.0, 0.0)
    )
    share, made = share_of_a(monkeypatch)
    assert made.stats().accepted > 300
    assert share == pytest.approx(0.7, abs=0.058)  # 4 standard deviations
    monkeypatch.setattr(Speculator, "_ask_choice", most_confident)
    share, _ = share_of_a(monkeypatch)
    assert share > 0.76
