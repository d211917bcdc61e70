"""EAGLE-3 in its three layouts against the paper's equations, step after step as text is confirmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.batch import TargetModel
from engine.checkpoints.drafters import DrafterError, read_folder
from engine.drafters.base import DraftBatch
from engine.drafters.eagle3 import Eagle3Drafter
from tests.unit.engine.drafters.layouts import HEADS, KV_HEADS, Scene, copy_beginning, eagle, parted, without_anchors, write
from tests.unit.engine.drafters.plain import eagle_chain
from tests.unit.engine.models.tiny import CHUNKED, make_hf, make_lean


@pytest.fixture(scope="module")
def hf() -> Any:
    return make_hf("qwen3")


@pytest.fixture(scope="module")
def target(hf: Any) -> TargetModel:
    return make_lean(hf)


@pytest.mark.parametrize(
    ("layout", "prefixes", "how"),
    [
        ("original", ["midlayer."], {}),
        ("deepspec", ["layers.0.", "layers.1."], {}),
        ("speculators", ["layers.0."], {"norm_before_residual": True}),
    ],
)
def test_layouts_draft_what_the_paper_says(
    tmp_path: Path, hf: Any, target: TargetModel, layout: str, prefixes: list[str], how: dict[str, bool]
) -> None:
    config, t = eagle(layout)
    if layout == "deepspec":
        t["embed_tokens.weight"] = target.frozen().embedding.clone()
    scene = Scene(target)
    drafter = Eagle3Drafter.load(read_folder(write(tmp_path / "d", config, t)), scene.host)
    steps = without_anchors(CHUNKED)
    scene.feed(drafter, steps[:3])
    # The first text stands at 13 of its tokens: what a draft there computed for rejected tokens must not be seen later.
    text = scene.sequences[0]
    whole, text.num_tokens = text.num_tokens, 14
    drafter.propose(DraftBatch([text], np.array([4]), 1))
    text.num_tokens = whole
    scene.feed(drafter, steps[3:])
    drafts = drafter.propose(DraftBatch(scene.sequences, np.array([4, 4, 4]), 2))
    embed = target.frozen().embedding
    for row, tokens in enumerate(scene.texts.tokens):
        features = fused(hf, tokens)
        assert drafts.token_ids[row].tolist() == eagle_chain(t, prefixes, features, tokens.tolist(), embed, (HEADS, KV_HEADS), 4, **how)


def fused(hf: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[T - 1, 3 * hidden]: what the head reads of a text."""
    with torch.inference_mode():
        states = hf(input_ids=tokens[None], output_hidden_states=True).hidden_states
    return torch.cat([states[tap][0, :-1] for tap in (1, 2, 3)], -1)


def test_what_it_missed_does_not_exist_for_it(tmp_path: Path, hf: Any, target: TargetModel) -> None:
    """Twice, with drafts in between: the head's cache then holds what is on both sides of a gap, each at its own position."""
    config, t = eagle("original")
    scene = Scene(target)
    drafter = Eagle3Drafter.load(read_folder(write(tmp_path / "d", config, t)), scene.host)
    text, tokens = scene.sequences[0], scene.texts.tokens[0].tolist()
    features, whole = fused(hf, scene.texts.tokens[0]), text.num_tokens

    def check(computed: int, seen: list[int]) -> None:
        text.num_tokens = computed + 1
        drafts = drafter.propose(DraftBatch([text], np.array([4]), computed))
        text.num_tokens = whole
        expected = eagle_chain(
            t, ["midlayer."], features, tokens[: computed + 1], target.frozen().embedding, (HEADS, KV_HEADS), 4, seen=seen
        )
        assert drafts.token_ids[0].tolist() == expected

    scene.feed(drafter, [[(0, 0, 3)]])
    scene.feed(drafter, [[(0, 3, 7)]], seen=False)
    scene.feed(drafter, [[(0, 7, 12)]])
    check(12, [0, 1, 2, 7, 8, 9, 10, 11])
    scene.feed(drafter, [[(0, 12, 13)]], seen=False)
    scene.feed(drafter, [[(0, 13, 14)]])
    check(14, [0, 1, 2, 7, 8, 9, 10, 11, 13])
    text.num_computed = 9  # preempted, and computed again while it looks on
    scene.feed(drafter, [[(0, 9, 15)]])
    check(15, [0, 1, 2, 7, 8, 9, 10, 11, 13, 14])


def test_it_drafts_nothing_for_a_text_whose_last_position_it_missed(tmp_path: Path, target: TargetModel) -> None:
    scene = Scene(target)
    drafter = Eagle3Drafter.load(read_folder(write(tmp_path / "d", *eagle("original"))), scene.host)
    scene.feed(drafter, [[(1, 0, 8), (2, 0, 13)]])
    scene.feed(drafter, [[(0, 0, 22)]], seen=False)
    assert drafter.follows(scene.sequences).tolist() == [False, True, True]
    drafts = drafter.propose(DraftBatch(scene.sequences, np.array([3, 2, 3]), 1))
    assert drafts.lengths.tolist() == [0, 2, 3]


def test_what_it_missed_hides_what_it_saw_of_another_text_in_the_same_place(tmp_path: Path, target: TargetModel) -> None:
    """A block that changed hands while the drafter rested still holds features of the text before."""
    folder = read_folder(write(tmp_path / "d", *eagle("original")))
    used, scene = Scene(target), Scene(target)
    drafters = [Eagle3Drafter.load(folder, used.host), Eagle3Drafter.load(folder, scene.host)]
    used.feed(drafters[0], [[(0, 0, 22)]])
    scene.feed(drafters[0], [[(0, 0, 10)]], seen=False)
    scene.feed(drafters[0], [[(0, 10, 22)]])
    scene.feed(drafters[1], [[(0, 10, 22)]])
    late, fresh = (drafter.propose(DraftBatch(scene.sequences[:1], np.array([5]), 1)) for drafter in drafters)
    assert late.lengths.tolist() == [5]
    assert late.token_ids.tolist() == fresh.token_ids.tolist()


def test_what_was_copied_is_known_as_if_it_had_been_shown(tmp_path: Path, target: TargetModel) -> None:
    folder = read_folder(write(tmp_path / "d", *eagle("original")))
    scenes = [Scene(target, texts=parted()) for _ in range(2)]
    copied, shown = (Eagle3Drafter.load(folder, scene.host) for scene in scenes)
    scenes[0].feed(copied, [[(0, 0, 3)], [(0, 3, 22)]])
    copied.copy(*copy_beginning(scenes[0]))
    scenes[0].feed(copied, [[(1, 6, 8)]])
    scenes[1].feed(shown, [[(1, 0, 8)]])
    assert copied.follows(scenes[0].sequences[1:2]).tolist() == [True]
    found, expected = (
        drafter.propose(DraftBatch(scene.sequences[1:2], np.array([5]), 1)) for drafter, scene in zip((copied, shown), scenes, strict=True)
    )
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    scenes[0].feed(copied, [[(0, 0, 22)]], seen=False)
    copied.copy(*copy_beginning(scenes[0]))
    assert copied.follows(scenes[0].sequences[1:2]).tolist() == [False], "it is a copy of what it did not see"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[1, 2, 9]), "reads hidden state 9"),
        (lambda c, t: c["eagle_config"].update(use_aux_hidden_state=False), "EAGLE-1 or 2"),
        (lambda c, t: t.pop("d2t"), "lacks d2t"),
        (lambda c, t: t.update(d2t=torch.full((60,), 90)), "d2t leads to token 149"),
        (lambda c, t: t.update({"midlayer.extra": torch.zeros(1)}), "does not use: midlayer.extra"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, target: TargetModel, change: Any, message: str) -> None:
    config, t = eagle("original")
    change(config, t)
    with pytest.raises(DrafterError, match=message):
        Eagle3Drafter.load(read_folder(write(tmp_path / "d", config, t)), Scene(target).host)
