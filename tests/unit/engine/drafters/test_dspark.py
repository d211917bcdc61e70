"""DSpark and DFlash in all their layouts against the papers' equations; refusals; exactness inside the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.batch import TargetModel
from engine.checkpoints.drafters import DrafterError, read_folder
from engine.drafters.base import DraftBatch, Drafts
from engine.drafters.dspark import DSparkDrafter
from engine.drafters.parts import backlog as backlogs
from engine.drafters.parts import frozen
from engine.drafters.parts.backlog import Backlog
from engine.drafters.parts.confidence import sigmoid
from engine.types import SamplingParams
from tests.unit.engine.drafters.layouts import (
    HEADS,
    KV_HEADS,
    MASK,
    VOCAB,
    Scene,
    copy_beginning,
    deepspec,
    head_weight,
    parted,
    speculators_block,
    without_anchors,
    write,
    zlab,
)
from tests.unit.engine.drafters.plain import block_hidden, sequential
from tests.unit.engine.models.tiny import CHUNKED, make_hf, make_lean


@pytest.fixture(scope="module")
def hf() -> Any:
    return make_hf("qwen3")


@pytest.fixture(scope="module")
def target(hf: Any) -> TargetModel:
    return make_lean(hf)


STEPS = without_anchors(CHUNKED)
STEPS = [
    [(text, start, min(end, length - 1)) for text, start, end in spans if start < (length := (23, 9, 14)[text]) - 1] for spans in CHUNKED
]
STEPS = [[span for span in spans if span[2] > span[1]] for spans in STEPS]


def load(folder: Path, target: TargetModel, **sampling: Any) -> tuple[Scene, DSparkDrafter]:
    scene = Scene(target, sampling=SamplingParams(**({"max_tokens": 40, "temperature": 0.0} | sampling)))
    drafter = DSparkDrafter.load(read_folder(folder), scene.host)
    scene.feed(drafter, STEPS)
    return scene, drafter


def propose(scene: Scene, drafter: DSparkDrafter, limits: list[int], step: int = 1) -> tuple[Drafts, np.ndarray]:
    return drafter.propose_scored(DraftBatch(scene.sequences, np.array(limits, np.int64), step))


def expected(
    hf: Any, text: torch.Tensor, t: dict, config: dict, taps: list, windows: list, first: int, head: torch.Tensor, embed: torch.Tensor
):
    """(tokens, confidences, logits) of a block of five slots after `text`."""
    with torch.inference_mode():
        states = hf(input_ids=text[None], output_hidden_states=True).hidden_states
    inputs = torch.tensor([int(text[-1]), *[MASK] * 4])
    features = [states[tap][0, :-1] for tap in taps]
    hidden = block_hidden(t, features, embed[inputs], windows, (HEADS, KV_HEADS))[first:]
    return sequential(t, config, hidden @ head.T, hidden, int(text[-1]))


@pytest.mark.parametrize(("kind", "rank"), [("vanilla", 8), ("gated", 8), ("rnn", 8), ("vanilla", 0)])
def test_deepspec_layout_drafts_what_the_paper_says(tmp_path: Path, hf: Any, target: TargetModel, kind: str, rank: int) -> None:
    config, t = deepspec(target, kind, rank)
    scene, drafter = load(write(tmp_path / "d", config, t), target)
    drafts, scores = propose(scene, drafter, [5, 5, 5])
    for row, text in enumerate(scene.texts.tokens):
        tokens, confidences, logits = expected(hf, text, t, config, [0, 3], [None, None], 0, t["lm_head.weight"], t["embed_tokens.weight"])
        assert drafts.token_ids[row].tolist() == tokens
        assert sigmoid(scores[row, :, 0]) == pytest.approx(confidences, abs=1e-4)
        assert sigmoid(scores[row, :, 1]) == pytest.approx([float(one.softmax(0).max()) for one in logits], abs=1e-4)
    assert drafts.probabilities is None


def test_zlab_layout_drafts_what_the_paper_says(tmp_path: Path, hf: Any, target: TargetModel) -> None:
    config, t = zlab()
    scene, drafter = load(write(tmp_path / "d", config, t), target)
    drafts, _ = propose(scene, drafter, [4, 0, 2])
    plain = t | {"confidence_head.proj.weight": torch.zeros(1, 48), "confidence_head.proj.bias": torch.zeros(1)}
    for row in (0, 2):
        settings = {"markov_rank": 0, "markov_head_type": "vanilla"}
        embed = target.frozen().embedding
        tokens, *_ = expected(hf, scene.texts.tokens[row], plain, settings, [1, 3], [None, 6], 1, head_weight(target), embed)
        assert drafts.token_ids[row, : (4, 0, 2)[row]].tolist() == tokens[: (4, 0, 2)[row]]
    assert drafts.lengths.tolist() == [4, 0, 2]
    assert drafts.bins[1].tolist() == [-1] * 4


@pytest.mark.parametrize(("kind", "changes", "first"), [("dspark", {}, 0), ("dflash", {}, 1), ("dflash", {"sample_from_anchor": True}, 0)])
def test_speculators_layout_drafts_over_its_own_vocabulary(
    tmp_path: Path, hf: Any, target: TargetModel, kind: str, changes: dict, first: int
) -> None:
    config, t = speculators_block(kind, **changes)
    scene, drafter = load(write(tmp_path / "d", config, t), target)
    count = 5 - first
    drafts, _ = propose(scene, drafter, [count] * 3)
    ids = torch.arange(60) + t["d2t"]
    full = t | {"markov_head.markov_w2.weight": torch.full((VOCAB, 8), 0.0)}
    head = torch.zeros(VOCAB, 48)
    head[ids] = t["lm_head.weight"]
    if kind == "dspark":
        full["markov_head.markov_w2.weight"][ids] = t["markov_head.markov_w2.weight"]
    else:
        full |= {"confidence_head.proj.weight": torch.zeros(1, 48), "confidence_head.proj.bias": torch.zeros(1)}
        config = config | {"markov_rank": 0, "markov_head_type": "vanilla"}
    for row, text in enumerate(scene.texts.tokens):
        tokens, _, _ = expected(hf, text, full, config, [1, 3], [None, None], first, head, target.frozen().embedding)
        assert drafts.token_ids[row].tolist() == tokens
        assert set(tokens) <= set(ids.tolist())


def test_a_large_head_is_kept_in_eight_bits_and_tells_what_it_drew_from(
    tmp_path: Path, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "d", *deepspec(target))
    scene, drafter = load(folder, target, temperature=0.7)
    exact, _ = propose(scene, drafter, [1, 1, 1])
    monkeypatch.setattr(frozen, "_LARGE", 0)
    scene, drafter = load(folder, target, temperature=0.7)
    rough, _ = propose(scene, drafter, [1, 1, 1])
    assert exact.probabilities is not None
    assert rough.probabilities is not None
    apart = (rough.probabilities - exact.probabilities).abs()
    assert 0.0 < float(apart.max()) < 0.02


def test_sampled_drafts_come_with_the_distribution_they_were_drawn_from(tmp_path: Path, hf: Any, target: TargetModel) -> None:
    config, t = deepspec(target)
    scene, drafter = load(write(tmp_path / "d", config, t), target, temperature=0.7)
    first = {}
    for step in range(40):
        drafts, _ = propose(scene, drafter, [3, 3, 3], step)
        assert drafts.probabilities is not None
        for row in range(3):
            first.setdefault(row, set()).add(int(drafts.token_ids[row, 0]))
    for row, text in enumerate(scene.texts.tokens):
        _, _, logits = expected(hf, text, t, config, [0, 3], [None, None], 0, t["lm_head.weight"], t["embed_tokens.weight"])
        assert drafts.probabilities[row, 0] == pytest.approx((logits[0] / 0.7).softmax(-1).numpy(), abs=1e-5)
        bias = t["markov_head.markov_w2.weight"] @ t["markov_head.markov_w1.weight"][drafts.token_ids[row, 0]]
        greedy_bias = t["markov_head.markov_w2.weight"] @ t["markov_head.markov_w1.weight"][int(logits[0].argmax())]
        second = (logits[1] - greedy_bias + bias) / 0.7
        assert drafts.probabilities[row, 1] == pytest.approx(second.softmax(-1).numpy(), abs=1e-5)
    assert max(map(len, first.values())) > 5


def test_longer_drafts_chain_blocks(tmp_path: Path, target: TargetModel) -> None:
    config, t = deepspec(target)
    scene, drafter = load(write(tmp_path / "d", config, t), target)
    short, _ = propose(scene, drafter, [5, 5, 5])
    long, _ = propose(scene, drafter, [12, 3, 0])
    assert long.lengths.tolist() == [12, 3, 0]
    assert long.token_ids[0, :5].tolist() == short.token_ids[0].tolist()
    assert long.token_ids[1, :3].tolist() == short.token_ids[1, :3].tolist()


def test_context_nobody_saw_is_masked_out(tmp_path: Path, target: TargetModel) -> None:
    """A drafter that came late, or a prefix computed before it: it drafts from what it knows."""
    config, t = deepspec(target)
    scene = Scene(target)
    drafter = DSparkDrafter.load(read_folder(write(tmp_path / "d", config, t)), scene.host)
    scene.feed(drafter, [[(0, 8, 22)]])
    drafts = drafter.propose(DraftBatch(scene.sequences[:1], np.array([3]), 1))
    assert drafts.lengths.tolist() == [3]
    assert (drafts.token_ids >= 0).all()


def test_what_it_missed_hides_what_it_saw_of_another_text_in_the_same_place(tmp_path: Path, target: TargetModel) -> None:
    """A block that changed hands while the drafter rested still holds keys and values of the text before."""
    config, t = deepspec(target)
    folder = write(tmp_path / "d", config, t)
    used, scene = Scene(target), Scene(target)
    drafters = [DSparkDrafter.load(read_folder(folder), used.host), DSparkDrafter.load(read_folder(folder), scene.host)]
    used.feed(drafters[0], [[(0, 0, 22)]])
    scene.feed(drafters[0], [[(0, 0, 10)]], seen=False)
    scene.feed(drafters[0], [[(0, 10, 22)]])
    scene.feed(drafters[1], [[(0, 10, 22)]])
    batch = DraftBatch(scene.sequences[:1], np.array([5]), 1)
    late, fresh = (drafter.propose_scored(batch) for drafter in drafters)
    assert late[0].token_ids.tolist() == fresh[0].token_ids.tolist()
    assert late[1] == pytest.approx(fresh[1])


def test_what_was_put_off_is_hidden_as_well_once_another_text_lies_there(tmp_path: Path, target: TargetModel) -> None:
    config, t = deepspec(target)
    folder = write(tmp_path / "d", config, t)
    used, scene = Scene(target), Scene(target)
    late, fresh = DSparkDrafter.load(read_folder(folder), used.host), DSparkDrafter.load(read_folder(folder), scene.host)
    used.feed(late, [[(0, 0, 22)]])
    scene.feed(late, [[(0, 0, 10)]], seen=False)
    scene.feed(late, [[(0, 10, 22)]])
    assert late.backlog > 22
    scene.feed(fresh, [[(0, 10, 22)]])
    fresh.catch_up()
    assert fresh.backlog == 0
    batch = DraftBatch(scene.sequences[:1], np.array([5]), 1)
    found, expected = late.propose_scored(batch), fresh.propose_scored(batch)
    assert late.backlog == 0
    assert found[0].token_ids.tolist() == expected[0].token_ids.tolist()
    assert found[1] == pytest.approx(expected[1], abs=1e-4)


@pytest.mark.parametrize(("together", "sizes"), [(100, [4]), (4, [1, 3]), (3, [1, 3])])
def test_of_tokens_that_lay_in_one_place_the_last_is_taken_in(together: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlogs, "_TOGETHER", together)
    backlog = Backlog()
    for first in (0, 10):
        rows = np.arange(first, first + 4)
        tap = torch.from_numpy(rows)[:, None].float()
        backlog.add([tap, -tap], rows, np.array([5, 3, 7 + first, 3]))
    assert len(backlog) == 8
    parts = list(backlog.take())
    assert [len(slots) for _, _, slots in parts] == sizes
    places = {slot: position for _, positions, slots in parts for slot, position in zip(slots.tolist(), positions.tolist(), strict=True)}
    assert places == {3: 13, 5: 10, 7: 2, 17: 12}
    for taps, positions, _ in parts:
        assert [tap[:, 0].tolist() for tap in taps] == [positions.tolist(), (-positions).tolist()]
    assert len(backlog) == 0
    assert list(backlog.take()) == []


def test_what_waits_for_a_slot_waits_for_its_copies_in_the_place_of_what_was_to_come_there() -> None:
    backlog = Backlog()
    for first, slots in ((0, [5, 3]), (10, [5, 7])):
        rows = np.arange(first, first + 2)
        backlog.add([torch.from_numpy(rows)[:, None].float()], rows, np.array(slots))
    backlog.copy(np.array([5, 5, 40]), np.array([20, 7, 3]))
    (part,) = backlog.take()
    taps, positions, slots = part
    assert taps[0][:, 0].tolist() == positions.tolist()
    places = dict(zip(slots.tolist(), positions.tolist(), strict=True))
    del places[0]  # nobody's
    assert places == {5: 10, 20: 10, 7: 10}, "the latest of what waited for 5; nothing for 3, whose new content has been taken in"


@pytest.mark.parametrize("put_off", [False, True])
def test_what_was_copied_is_known_as_if_it_had_been_shown(tmp_path: Path, target: TargetModel, put_off: bool) -> None:
    """Two texts that part inside a block, where the second's blocks were another text's, which it still has to take in."""
    folder = read_folder(write(tmp_path / "d", *deepspec(target)))
    scenes = [Scene(target, texts=parted()) for _ in range(2)]
    copied, shown = (DSparkDrafter.load(folder, scene.host) for scene in scenes)
    scenes[0].feed(copied, [[(1, 0, 8)]])
    other = Scene(target)
    other.feed(copied, [[(1, 0, 8)]])
    scenes[0].feed(copied, [[(0, 0, 22)]])
    if not put_off:
        copied.catch_up()
    slots = copy_beginning(scenes[0])
    copied.copy(*slots)
    scenes[0].feed(copied, [[(1, 6, 8)]])
    scenes[1].feed(shown, [[(1, 0, 8)]])
    assert copied.follows(scenes[0].sequences[1:2]).tolist() == [True]
    (found, scores), (expected, expected_scores) = (
        drafter.propose_scored(DraftBatch(scene.sequences[1:2], np.array([5]), 1))
        for drafter, scene in zip((copied, shown), scenes, strict=True)
    )
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert scores == pytest.approx(expected_scores, abs=1e-4)


def test_a_copy_of_what_was_missed_is_not_known(tmp_path: Path, target: TargetModel) -> None:
    scene = Scene(target, texts=parted())
    drafter = DSparkDrafter.load(read_folder(write(tmp_path / "d", *deepspec(target))), scene.host)
    scene.feed(drafter, [[(1, 0, 8)]])
    scene.feed(drafter, [[(0, 0, 22)]], seen=False)
    drafter.copy(*copy_beginning(scene))
    assert drafter.follows(scene.sequences[1:2]).tolist() == [False]


def test_of_a_prompt_longer_than_what_it_was_trained_on_it_takes_in_the_end(tmp_path: Path, target: TargetModel) -> None:
    config, t = deepspec(target)
    folder = write(tmp_path / "d", config, t)
    whole, scene = Scene(target), Scene(target)
    everything = DSparkDrafter.load(read_folder(folder), whole.host)
    (folder / "longdraft_drafter.json").write_text('{"training": {"max_length": 12}}')
    windowed = DSparkDrafter.load(read_folder(folder), scene.host)
    length = whole.sequences[0].prompt_length
    whole.feed(everything, [[(0, 0, length - 12)]], seen=False)
    whole.feed(everything, [[(0, length - 12, length - 1)]])
    scene.feed(windowed, [[(0, 0, 5)], [(0, 5, length - 1)]])
    batch = DraftBatch(scene.sequences[:1], np.array([5]), 1)
    of_end, of_window = (drafter.propose_scored(batch) for drafter in (everything, windowed))
    assert of_window[0].token_ids.tolist() == of_end[0].token_ids.tolist()
    assert of_window[1] == pytest.approx(of_end[1], abs=1e-4)
    whole.feed(everything, [[(0, 0, length - 1)]])
    assert np.abs(everything.propose_scored(batch)[1] - of_end[1]).max() > 1e-3


def test_it_follows_a_text_whose_end_it_saw(tmp_path: Path, target: TargetModel) -> None:
    scene = Scene(target)
    drafter = DSparkDrafter.load(read_folder(write(tmp_path / "d", *deepspec(target))), scene.host)
    scene.feed(drafter, [[(0, 0, 2), (1, 0, 8)]])
    scene.feed(drafter, [[(2, 0, 13)]], seen=False)
    assert drafter.follows(scene.sequences).tolist() == [True, True, False]
    scene.feed(drafter, [[(0, 2, 4)]], seen=False)
    scene.feed(drafter, [[(0, 4, 19)]])
    assert drafter.follows(scene.sequences).tolist() == [False, True, False]
    scene.feed(drafter, [[(0, 19, 20)]])
    assert drafter.follows(scene.sequences).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(hidden_size=32), "hidden size"),
        (lambda c, t: c.update(num_target_layers=9), "9 layers, but tiny has 4"),
        (lambda c, t: c.update(vocab_size=90), "vocabulary of 90 tokens, but tiny one of 101"),
        (lambda c, t: c.update(target_layer_ids=[2, 7]), "reads hidden state 8, but tiny has 4 layers"),
        (lambda c, t: c.update(mask_token_id=500), "mask_token_id is 500"),
        (lambda c, t: c.update(block_size=40), "block_size is 40"),
        (lambda c, t: c.update(markov_head_type="lstm"), "markov_head_type is 'lstm'"),
        (lambda c, t: t.pop("fc.weight"), r"lacks fc.weight"),
        (lambda c, t: t.update({"layers.2.mlp.up_proj.weight": torch.zeros(2)}), "does not use: layers.2.mlp.up_proj.weight"),
        (lambda c, t: t.update({"norm.weight": torch.zeros(7)}), r"norm.weight \(7,\), expected \(48,\)"),
        (lambda c, t: t.update({"embed_tokens.weight": torch.randn(101, 48)}), "trained for another model of the same size"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, target: TargetModel, change: Any, message: str) -> None:
    config, t = deepspec(target)
    change(config, t)
    with pytest.raises(DrafterError, match=message):
        DSparkDrafter.load(read_folder(write(tmp_path / "d", config, t)), Scene(target).host)


def test_a_folder_that_is_no_drafter_says_what_would_make_it_one(tmp_path: Path) -> None:
    with pytest.raises(DrafterError, match="no speculators_model_type"):
        read_folder(write(tmp_path / "d", {"hello": 1}, {"x": torch.zeros(1)}))
    with pytest.raises(DrafterError, match=r"no config\.json"):
        read_folder(tmp_path)
