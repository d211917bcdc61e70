"""Whatever drafts, and however the portfolio chooses: greedy text is plain decoding's, sampled text has the target's distribution."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from engine.kv_blocks import BlockPool
from engine.speculation import portfolio as portfolio_module
from engine.speculation import speculator as speculator_module
from engine.speculation.cost_model import CostModel
from engine.speculation.experience import PRICES
from engine.speculation.portfolio import Portfolio, earned
from engine.speculation.speculator import Speculator
from engine.types import Request, SamplingParams
from tests.unit.engine.drafters.layouts import VOCAB, deepspec, eagle, write, zlab
from tests.unit.engine.hash_model import Letters
from tests.unit.engine.models.tiny import make_hf, make_lean
from tests.unit.engine.test_exactness import Guesser, TableModel


@dataclass
class Loaded:
    model: TargetModel
    tokenizer: Letters
    directory: Path | None = None


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


def jobs(count: int, **sampling: Any) -> list[Request]:
    rng = np.random.default_rng(4)
    shared = rng.integers(3, VOCAB, 13).tolist()
    made = []
    for number in range(count):
        prompt = shared[: int(rng.choice([0, 9, 13]))] + rng.integers(3, VOCAB, int(rng.integers(2, 9))).tolist()
        params = SamplingParams(**({"max_tokens": int(rng.integers(5, 22)), "temperature": 0.0, "ignore_eos": True} | sampling))
        made.append(Request(str(number), tuple(prompt), params))
    return made


def run(target: TargetModel, made: list[Request], drafter: str, directory: Path | None = None, **fields: Any) -> tuple[dict, Engine]:
    config = {"kv_bytes": 4 << 20, "block_size": 4, "max_step_tokens": 64, "max_draft_tokens": 6, "seed": 3, "max_sequences": 8} | fields
    engine = Engine(Loaded(target, Letters(), directory), EngineConfig(drafter=drafter, **config))
    return {result.id: result.token_ids for result in engine.run(iter(made))}, engine


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


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafters_in_eight_bits_leave_the_text_alone(
    target: TargetModel, folders: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    made = jobs(7, temperature=temperature, seed=5)
    plain, _ = run(target, made, "off")
    monkeypatch.setattr(frozen, "_LARGE", 0)
    text, engine = run(target, made, str(folders / "dspark"), fixed_drafts=4)
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


def tokens(*counts: float) -> Any:
    """So many tokens a step, whatever a draft's verification costs."""
    return np.repeat(np.array(counts)[:, None], len(PRICES), axis=1)


def test_the_portfolio_settles_on_what_pays() -> None:
    portfolio = Portfolio({"good": (), "bad": ()}, 4)
    slots, kinds = np.arange(4), ["a", "a", "b", "b"]
    for seconds in (9.0, 0.004, 0.004):  # the first pass does not count: it compiles
        portfolio.learn_seconds("good", 4, seconds)
        portfolio.learn_seconds("bad", 4, seconds)
    for _ in range(40):
        portfolio.learn("good", slots, kinds, tokens(*[4.0] * 4))
        portfolio.learn("bad", slots, kinds, tokens(*[0.1] * 4))
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.0) == ["good"] * 4
    # A lookup that promises more, or a pass that costs more than it brings.
    assert portfolio.choose(slots, kinds, np.full(4, 6.0), 100.0, 0.0) == [None] * 4
    assert portfolio.choose(slots, kinds, np.zeros(4), 1e5, 0.0) == [None] * 4
    # A new request starts from its template's record.
    portfolio.enter(0)
    assert portfolio.choose(slots, kinds, np.array([1.0, 9.0, 9.0, 9.0]), 100.0, 0.0) == ["good", None, None, None]


def test_each_template_uses_what_was_best_for_it() -> None:
    portfolio = Portfolio({"code": (), "chat": ()}, 2)
    for _ in range(40):
        for kind, slot in (("code", 0), ("chat", 1)):
            portfolio.learn("code", np.array([slot]), [kind], tokens(5.0 if kind == "code" else 0.2))
            portfolio.learn("chat", np.array([slot]), [kind], tokens(0.2 if kind == "code" else 5.0))
    assert portfolio.choose(np.arange(2), ["code", "chat"], np.ones(2), 0.0, 0.0) == ["code", "chat"]


def test_the_better_of_two_that_pay_drafts_and_one_that_is_hardly_used_does_not_pay_its_fixed_cost() -> None:
    portfolio = Portfolio({"fair": (), "fine": ()}, 4)
    slots = np.arange(4)
    for _ in range(60):
        portfolio.learn("fair", slots, ["a", "a", "a", "b"], tokens(2.0, 2.0, 2.0, 4.0))
        portfolio.learn("fine", slots, ["a", "a", "a", "b"], tokens(3.0, 3.0, 3.0, 3.0))
    kinds: list[str | None] = ["a", "a", "a", "b"]
    assert portfolio.choose(slots, kinds, np.zeros(4), 0.0, 0.0) == ["fine", "fine", "fine", "fair"]
    for _ in range(60):
        for requests in (1, 4):
            portfolio.learn_seconds("fair", requests, 0.005)
            portfolio.learn_seconds("fine", requests, 0.005)
    # At 1000 tokens a second a pass costs 5 tokens, more than `fair` brings for its one request: `fine` takes that, too.
    assert portfolio.choose(slots, kinds, np.zeros(4), 1000.0, 0.0) == ["fine"] * 4


def test_tags_say_where_a_drafter_is_tried_first_and_measurement_decides() -> None:
    portfolio = Portfolio({"coder": ("code",)}, 2)
    slots = np.arange(2)
    assert portfolio.choose(slots, ["code", "chat"], np.ones(2), 0.0, 0.0) == ["coder", None]
    for _ in range(10):
        portfolio.learn("coder", slots, ["code", "chat"], tokens(0.1, 4.0))
    assert portfolio.choose(slots, ["code", "chat"], np.ones(2), 0.0, 0.0) == [None, "coder"]


def test_a_new_drafter_is_tried_on_one_request_at_a_time() -> None:
    portfolio, slots, kinds = Portfolio({"new": ()}, 4), np.arange(4), ["a"] * 4
    for brought in (0.0, 0.0, 9.0, 9.0, 9.0):
        names = portfolio.choose(slots, kinds, np.array([1.0, 0.0, 1.0, 1.0]), 100.0, 0.0)
        assert names == [None, "new", None, None]
        portfolio.learn("new", slots[1:2], kinds[:1], tokens(brought))
    assert portfolio.choose(slots, kinds, np.ones(4), 100.0, 0.0) == ["new"] * 4


def test_a_drafter_is_worth_what_its_drafts_bring_beyond_the_price_of_verifying_them() -> None:
    survival = np.array([[0.9, 0.6, 0.3]])
    assert earned(survival, survival)[0] == pytest.approx([np.maximum(survival - price, 0.0).sum() for price in PRICES])
    # One that promises more than it keeps earns what it keeps.
    assert earned(np.array([[0.9, 0.9]]), np.array([[0.5, 0.0]]))[0, 2] == pytest.approx(0.5 - 2 * 0.2)
    portfolio, slots, kinds = Portfolio({"fair": ()}, 4), np.arange(4), ["a"] * 4
    for _ in range(40):
        portfolio.learn("fair", slots, kinds, earned(np.full((4, 1), 0.6), np.full((4, 1), 0.6)))
        portfolio.learn_seconds("fair", 4, 0.004)
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.3) == ["fair"] * 4
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.7) == [None] * 4
    # Full steps pass no verdict on it; in others it is tried more and more seldom, and let go of in the end.
    for _ in range(1000):
        portfolio.choose(slots, kinds, np.zeros(4), 1e5, 0.7)
    assert portfolio.let_go() == []
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.3) == ["fair"] * 4
    tried = [step for step in range(1, 500) if any(portfolio.choose(slots, kinds, np.zeros(4), 1e5, 0.3))]
    assert tried == [32, 64, 128, 256]
    for _ in range(20):
        portfolio.choose(slots, kinds, np.zeros(4), 1e5, 0.3)
    assert portfolio.let_go() == ["fair"]


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


def test_a_drafter_that_cannot_follow_a_text_is_not_chosen_for_it_and_attends_again_once_it_would_be() -> None:
    portfolio, slots, kinds = Portfolio({"good": ()}, 4), np.arange(4), ["a"] * 4
    some, nobody = {"good": np.array([False, True, True, False])}, {"good": np.zeros(4, bool)}
    for _ in range(40):
        portfolio.learn("good", slots, kinds, tokens(*[4.0] * 4))
        portfolio.learn_intake("good", 4, 4 * 0.0001)
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.0, some) == [None, "good", "good", None]
    for _ in range(200):
        assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.0, nobody) == [None] * 4
        portfolio.foresee(4, 100.0, {"good": 1.0})
        assert portfolio.attends("good")
    # A lookup that promises more: nobody wants it, and it looks up only before it is tried, where it can follow.
    attended, tried = [], []
    for step in range(1, 600):
        portfolio.foresee(4, 100.0, {"good": 1.0})
        follows = some if portfolio.attends("good") else nobody
        attended.append(portfolio.attends("good"))
        if "good" in (names := portfolio.choose(slots, kinds, np.full(4, 9.0), 100.0, 0.0, follows)):
            tried.append(step)
            assert names.count("good") == 1
            assert names[1:3].count("good") == 1
    assert 1 <= len(tried) <= 5
    assert sum(attended) < 250
    assert all(all(attended[max(step - 20, 0) : step]) for step in tried)
    # Then the lookup has nothing, and it would pay: it follows from that step on.
    portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.0, nobody)
    portfolio.foresee(4, 100.0, {"good": 1.0})
    assert portfolio.attends("good")


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


def test_a_pool_grows_without_touching_what_it_holds() -> None:
    pool = BlockPool(4, 4)
    held = pool.allocate(3)
    pool.grow(3)
    assert sorted(pool.allocate(3)) == [4, 5, 6]
    pool.release(held, 0)
    pool.check()


def test_finished_answers_from_elsewhere_draft_for_their_siblings(target: TargetModel) -> None:
    request = jobs(1, max_tokens=25)[0]
    answers, _ = run(target, [request], "off")
    engine = run(target, [], "suffix")[1]
    engine.observe_finished(None, [*request.prompt_token_ids[-16:], *answers["0"]])
    [result] = engine.run(iter([request]))
    assert result.token_ids == answers["0"]
    assert engine.stats().accepted > 15
