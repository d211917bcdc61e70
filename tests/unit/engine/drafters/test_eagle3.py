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
from tests.unit.engine.drafters.layouts import HEADS, KV_HEADS, Scene, eagle, without_anchors, write
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
        with torch.inference_mode():
            states = hf(input_ids=tokens[None], output_hidden_states=True).hidden_states
        features = torch.cat([states[tap][0, :-1] for tap in (1, 2, 3)], -1)
        assert drafts.token_ids[row].tolist() == eagle_chain(t, prefixes, features, tokens.tolist(), embed, (HEADS, KV_HEADS), 4, **how)


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
