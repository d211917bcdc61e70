"""Hidden states for training: many texts at once, and no more on disk than allowed."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.checkpoints import LoadedModel
from engine.training.states import StateStore, forward_states


def test_states_of_several_texts_in_one_forward_are_those_of_each(loaded: LoadedModel) -> None:
    texts = [tuple(range(1, 30)), tuple(range(5, 12)), tuple(range(2, 50))]
    together = forward_states(loaded.model, texts, (1, 2))
    for text, (taps, final) in zip(texts, together, strict=True):
        alone_taps, alone_final = forward_states(loaded.model, [text], (1, 2))[0]
        torch.testing.assert_close(taps, alone_taps, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(final, alone_final, rtol=2e-3, atol=2e-3)


def test_states_stop_at_their_bound_and_are_written_once(loaded: LoadedModel, tmp_path: Path) -> None:
    from engine.training.answers import Text

    texts = [Text(str(n), tuple(range(1, 40)), 5) for n in range(10)]
    size = StateStore(tmp_path / "all", 1 << 30)
    assert size.write(texts, loaded.model, (1, 2))
    each = next((tmp_path / "all").glob("*.safetensors")).stat().st_size
    bounded = StateStore(tmp_path / "some", 3 * each)
    assert not bounded.write(texts, loaded.model, (1, 2))
    assert len(bounded.names()) == 3
    assert not bounded.write(texts, loaded.model, (1, 2))
    assert len(bounded.names()) == 3
