"""The drafter of a device's steps against the one between steps: the same drafts, bins and survival from the same context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.batch import TargetModel
from engine.checkpoints.drafters import read_folder
from engine.drafters.base import DraftBatch, Progress
from engine.drafters.dspark import DSparkDrafter
from engine.drafters.parts.confidence import LEVELS, sigmoid
from engine.drafters.parts.places import slots_of
from engine.pipeline import DeviceState
from engine.row_table import RowTable
from engine.scheduler import Chunk
from engine.sequence import Sequence
from engine.speculation.calibration import HIGHEST
from engine.types import SamplingParams
from tests.unit.engine.drafters.layouts import BLOCK_LAYOUTS, HIDDEN, VOCAB, Scene, without_anchors
from tests.unit.engine.models.tiny import BLOCK_SIZE, CHUNKED


@pytest.mark.parametrize("drafter", BLOCK_LAYOUTS)
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 11}])
def test_drafts_are_those_that_are_drafted_between_steps(
    block_target: TargetModel, block_drafters: Path, drafter: str, sampling: dict
) -> None:
    """The same context, read by gathering and by pages; of one text the drafter missed the beginning."""
    scene = Scene(block_target, sampling=SamplingParams(max_tokens=40, **sampling))
    spare = scene.pool.num_blocks
    host = replace(scene.host, num_blocks=spare + 12)  # room for blocks behind the texts
    made = DSparkDrafter.load(read_folder(block_drafters / drafter), host)
    scene.feed(made, [[span for span in spans if span[0] != 0] for spans in without_anchors(CHUNKED)])
    scene.feed(made, [[(0, 0, 5)]], seen=False)
    scene.feed(made, [[(0, 5, 22)]])
    assert [made.knows_from(sequence) for sequence in scene.sequences] == [2, 0, 0]
    for position in (5, 6, 7):  # in a block of which a part was missed: pages leave out all of it
        made.miss(position_of(scene.sequences[0], position))
    between = made.propose(DraftBatch(scene.sequences, np.full(3, made.drafts_per_pass), 1))
    blocks, table = made.on_device(4), RowTable(8, 0)
    state = DeviceState.empty(4, 16, torch.device("cpu"))
    for slot, sequence in enumerate(scene.sequences):
        table.enter(sequence)
        blocks.enter(slot, made.knows_from(sequence))
        state.tables[slot, : len(sequence.blocks)] = torch.tensor(sequence.blocks, dtype=torch.int32)
        state.last[slot], state.length[slot], state.left[slot] = int(sequence.tokens[-1]), sequence.num_computed, 20
        state.made[slot], state.seeds[slot] = sequence.num_generated, table.seed(slot)
        state.modes[slot], state.temperatures[slot] = int("seed" in sampling), sampling["temperature"] or 1.0
    for slot in range(3):
        held = len(scene.sequences[slot].blocks)
        state.tables[slot, held : held + 4] = spare + 4 * slot + torch.arange(4, dtype=torch.int32)
    with torch.inference_mode():
        found = blocks(state)
    assert found.bins is not None
    assert found.tokens[:3].tolist() == between.token_ids.tolist()
    assert found.bins[:3].tolist() == between.bins.tolist()
    survival = np.cumprod(np.minimum(made.prior[between.bins], HIGHEST), axis=1)
    assert found.survival[:3].numpy() == pytest.approx(survival, rel=1e-5)
    logits, shifts = np.linspace(-3.0, 4.0, len(made.prior)), np.array([0.0, -1.0, 2.0, 0.0])
    blocks.trust(logits, shifts, np.array([3.0, 1.0, 0.1, 1.0]))
    with torch.inference_mode():
        found = blocks(state)
    chances = np.minimum(sigmoid(logits[between.bins] + shifts[:3, None]), HIGHEST)
    expected = chances.cumprod(axis=1) * np.array([[3.0], [1.0], [0.1]])
    assert found.survival[:3].numpy() == pytest.approx(expected, rel=1e-5)


def test_a_context_without_numbers_costs_nobody_else_the_step(block_target: TargetModel, block_drafters: Path) -> None:
    """A request whose numbers overflowed is found out when its step is read: by then the next one has drafted from them."""
    scene = Scene(block_target, sampling=SamplingParams(max_tokens=40, temperature=0.0))
    host = replace(scene.host, num_blocks=scene.pool.num_blocks + 12)
    made = DSparkDrafter.load(read_folder(block_drafters / "dspark"), host)
    scene.feed(made, without_anchors(CHUNKED))
    blocks, state = made.on_device(4), DeviceState.empty(4, 16, torch.device("cpu"))
    for slot, sequence in enumerate(scene.sequences):
        held = len(sequence.blocks)
        state.tables[slot, :held] = torch.tensor(sequence.blocks, dtype=torch.int32)
        state.tables[slot, held : held + 4] = scene.pool.num_blocks + 4 * slot + torch.arange(4, dtype=torch.int32)
        state.last[slot], state.length[slot], state.left[slot] = int(sequence.tokens[-1]), sequence.num_computed, 20
    with torch.inference_mode():
        sound = blocks(state)
        own = torch.from_numpy(slots_of(scene.sequences[1], np.arange(scene.sequences[1].num_computed), BLOCK_SIZE))
        blocks.observe({tap: torch.full((len(own), HIDDEN), torch.nan) for tap in blocks.taps}, torch.arange(len(own)), own)
        found = blocks(state)
    assert sound.bins is not None
    assert found.bins is not None
    for name in ("tokens", "survival", "bins"):
        assert torch.equal(getattr(found, name)[[0, 2]], getattr(sound, name)[[0, 2]]), name
    assert (found.bins[1] % LEVELS == 0).all(), "the least confidence that there is"
    assert ((found.tokens[1] >= 0) & (found.tokens[1] < VOCAB)).all()


def position_of(sequence: Sequence, position: int) -> Progress:
    slot = sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
    place, one = np.array([position]), np.ones(1, np.int64)
    return Progress([Chunk(sequence, position, 1)], np.array([0, 1], np.int32), one, place, np.array([slot]))
