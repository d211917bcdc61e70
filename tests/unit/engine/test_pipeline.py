"""Decoding with its state on the device: late results, variable-length verification, and the texts of plain decoding."""

from __future__ import annotations

import pytest
import torch

from engine.graphs import DirectCapture
from engine.kv_pool import KVPool
from engine.pipeline import DecodePipeline, DeviceDrafts, DeviceState
from tests.unit.engine.models.tiny import make_hf, make_lean

BLOCK, PROMPTS = 4, ((5, 6, 7, 8, 9), (11,), (20, 21, 22))
LENGTHS = (9, 14, 3)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Greedy continuations by transformers, longer than is asked for."""
    hf = make_hf("llama")
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(max(LENGTHS) + 4):
            tokens.append(int(hf(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


class Oracle:
    """Knows the texts, errs at every third position, and trusts its drafts differently in each slot and step."""

    def __init__(self, texts: list[list[int]]) -> None:
        padding = [0] * 8
        self.asked = 0
        self.known = torch.tensor([text + padding for text in texts] + [[0] * (len(texts[0]) + 8)])

    def __call__(self, state: DeviceState) -> DeviceDrafts:
        at = (state.made[:, None] + 1 + torch.arange(3)).clamp(max=self.known.shape[1] - 1)
        drafts = self.known.gather(1, at)
        wrong = at % 3 == 2
        trust = ((7 * state.made + 3 * torch.arange(4)) % 5 + 1) / 6
        self.asked += 1
        return DeviceDrafts(torch.where(wrong, (drafts + 1) % 50, drafts), trust[:, None] ** torch.arange(1.0, 4.0))


def start(drafter: Oracle | None, texts: list[list[int]]) -> DecodePipeline:
    model = make_lean(make_hf("llama"))
    kv = KVPool(4, 40, BLOCK, 2, 8, torch.float32, torch.device("cpu"))
    pipeline = DecodePipeline(model, kv, slots=4, width=8, capture=DirectCapture(), max_drafts=3 if drafter else 0, drafter=drafter)
    from engine.batch import ForwardBatch

    for slot, prompt in enumerate(PROMPTS):
        blocks = list(range(1 + 8 * slot, 9 + 8 * slot))
        count = len(prompt)
        position = torch.arange(count)
        batch = ForwardBatch(
            torch.tensor(prompt), position, torch.tensor(blocks)[position // BLOCK] * BLOCK + position % BLOCK,
            torch.tensor([blocks]).int(), torch.tensor([0, count]).int(), torch.tensor([count]).int(),
            torch.tensor([count - 1]), count, count,
        )  # fmt: skip
        first = int(model.forward(batch, kv).logits[0].argmax())
        assert first == texts[slot][0]
        pipeline.enter(slot, last=first, length=count, left=LENGTHS[slot], blocks=blocks)
    return pipeline


@pytest.mark.parametrize("drafts", [(0,), (3,), (1, 2), (2, 0, 1, 3)])
def test_texts_are_those_of_plain_decoding_with_results_one_step_late(drafts: tuple[int, ...], texts: list[list[int]]) -> None:
    oracle = Oracle(texts) if any(drafts) else None
    pipeline = start(oracle, texts)
    made: list[list[int]] = [[] for _ in range(4)]
    launched = 0
    pipeline.launch(drafts[0])
    while any(len(made[slot]) < LENGTHS[slot] for slot in range(3)):
        pipeline.launch(drafts[(launched + 1) % len(drafts)])  # before anything of the step before is known
        launched += 1
        assert pipeline.in_flight == 2
        result = pipeline.collect()
        assert result.finite.all()
        for slot in range(4):
            made[slot] += result.tokens[slot, : result.counts[slot]].tolist()
    assert made == [*(text[1 : 1 + length] for text, length in zip(texts, LENGTHS, strict=True)), []]
    assert launched < max(LENGTHS) if oracle else launched == max(LENGTHS)
    rest = pipeline.collect()
    assert not rest.counts.any(), "a slot at its limit rests by itself"


def test_rows_go_to_the_drafts_that_are_likeliest_to_stand(texts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    import kernels

    oracle = Oracle(texts)
    pipeline = start(oracle, texts)
    chosen: list[list[int]] = []
    allocate = kernels.allocate_top

    def watched(survival: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
        lengths = allocate(survival, capacity)
        assert int(capacity) == 4
        ranked = survival.flatten().sort(descending=True, stable=True).indices[: min(4, int((survival > 0).sum()))]
        assert lengths.tolist() == torch.bincount(ranked // 3, minlength=4).tolist()
        chosen.append(lengths.tolist())
        return lengths

    monkeypatch.setattr(kernels, "allocate_top", watched)
    for _ in range(4):
        pipeline.launch(1)
        pipeline.collect()
    assert any(len(set(lengths[:3])) > 1 for lengths in chosen), "not everybody gets the same"
    assert all(lengths[3] == 0 for lengths in chosen), "nobody is in the last slot"
    asked = oracle.asked
    pipeline.launch(0)
    assert oracle.asked == asked
    with pytest.raises(ValueError, match="0 to 3 drafts a slot, got 4"):
        pipeline.launch(4)


def test_a_retired_slot_makes_nothing_from_the_next_launch_on(texts: list[list[int]]) -> None:
    pipeline = start(None, texts)
    pipeline.launch()
    pipeline.launch()
    pipeline.retire(1)
    pipeline.launch()
    counts = [pipeline.collect().counts.tolist() for _ in range(3)]
    assert counts == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 1, 0]]


def test_drafts_need_a_drafter() -> None:
    model = make_lean(make_hf("llama"))
    kv = KVPool(4, 4, BLOCK, 2, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="3 drafts a step and no drafter"):
        DecodePipeline(model, kv, slots=1, width=2, capture=DirectCapture(), max_drafts=3)


@pytest.mark.parametrize(("left", "blocks"), [(20, 5), (30, 9)])
def test_blocks_that_do_not_fit_are_refused_before_anything_is_overwritten(left: int, blocks: int) -> None:
    model = make_lean(make_hf("llama"))
    kv = KVPool(4, 12, BLOCK, 2, 8, torch.float32, torch.device("cpu"))
    pipeline = DecodePipeline(model, kv, slots=1, width=8, capture=DirectCapture())
    with pytest.raises(ValueError, match=f"5 \\+ {left} tokens and 0 drafts need"):
        pipeline.enter(0, last=3, length=5, left=left, blocks=list(range(1, 1 + blocks)))
