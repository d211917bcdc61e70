"""A drafter that learns from the job it runs in: what is kept, what is compared, and that it takes over only where it is better."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import LoadedModel, load_model
from engine.checkpoints.drafters.formats import block_spec
from engine.config import EngineConfig
from engine.engine import Engine
from engine.training import adapt
from engine.training.adapt import AdaptConfig, Adapter, better_by
from engine.training.export import write_folder
from engine.training.module import BlockModule
from engine.training.run import Recipe, drafter_config
from engine.training.states import forward_states
from engine.types import Request, SamplingParams
from tests.tiny_model import make_tiny_model

QUICK = {"texts": 12, "kept": 40, "steps": 60, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A target that is sure of what it says: random logits alone are too level for a draft to be right."""
    folder = make_tiny_model(tmp_path_factory.mktemp("target") / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 40.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load_model(str(folder))


@pytest.fixture(scope="module")
def drafter(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: anything learned is better."""
    config = drafter_config(loaded, Recipe(layers=1, block_size=4, rank=8))
    return write_folder(
        tmp_path_factory.mktemp("drafters") / "fresh", config, BlockModule(block_spec(config), seed=3).tensors(), {"name": "fresh"}
    )


def job(count: int, tokens: int = 24, prompts: int = 2) -> list[Request]:
    """A few prompts, over and over: whoever learns from the first answers knows the others."""
    texts = ((5, 6, 7, 8, 9, 10), (20, 21, 22, 23))
    return [Request(str(n), texts[n % prompts], SamplingParams(max_tokens=tokens, temperature=0.0), template="t") for n in range(count)]


def made(loaded: LoadedModel, drafter: Path, **changes: object) -> Engine:
    return Engine(loaded, EngineConfig(drafter=str(drafter), kv_bytes=4 << 20, max_sequences=4, seed=1, **changes))  # type: ignore[arg-type]


def test_what_is_kept_of_a_request_are_its_hidden_states(loaded: LoadedModel, drafter: Path) -> None:
    engine = made(loaded, drafter, adapt=True, share_prefixes=False, fixed_drafts=3)
    results = {result.id: result for result in engine.run(iter(job(6)))}
    assert engine._changes.adapting is not None
    texts = engine._changes.adapting[1].collector.texts()
    assert 4 <= len(texts) <= 6
    said = {(*request.prompt_token_ids, *results[request.id].token_ids) for request in job(6)}
    for states in texts.values():
        tokens = tuple(states.tokens.tolist())
        assert any(text[: len(tokens)] == tokens for text in said)
        taps, final = forward_states(loaded.model, [tokens], block_spec(drafter_config(loaded, Recipe(layers=1))).taps)[0]
        torch.testing.assert_close(states.taps, taps, rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(states.final, final, rtol=5e-3, atol=5e-3)
        assert states.prompt_length in (4, 6)


def test_new_weights_are_given_only_where_they_are_better_on_texts_that_were_not_trained_on(loaded: LoadedModel, drafter: Path) -> None:
    engine = made(loaded, drafter, adapt=True)
    list(engine.run(iter(job(24))))
    assert engine._changes.adapting is not None
    texts, spec = engine._changes.adapting[1].collector.texts(), engine._changes.adapting[1]._spec
    tensors = engine._changes.adapting[1]._tensors
    learned = Adapter(spec, tensors, loaded.model.frozen(), AdaptConfig(**QUICK)).improve(texts)  # type: ignore[arg-type]
    assert learned is not None
    assert learned.keys() == tensors.keys()
    still = AdaptConfig(**{**QUICK, "learning_rate": 0.0})  # type: ignore[arg-type]
    assert Adapter(spec, tensors, loaded.model.frozen(), still).improve(texts) is None


def test_a_rise_must_be_more_than_chance() -> None:
    before = np.array([1.5, 2.0, 1.0, 3.0, 2.5, 1.2, 2.2, 1.9])
    assert better_by(before, before + 0.2) == pytest.approx(0.2)
    assert better_by(before, before + np.tile([0.6, -0.5], 4)) < 0.0
    assert better_by(before, before) == 0.0


def test_a_drafter_that_learns_beside_the_job_is_exchanged_and_changes_no_answer(
    loaded: LoadedModel, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far a round of learning gets while a part of the job runs depends on what else the machine does, so parts are run until one
    began with what was learned, with all the time between them that a round wants, and it is held against a job that learned nothing."""

    def share(engine: Engine, since: tuple[int, int] = (0, 0)) -> float:
        stats = engine.stats()
        return (stats.accepted - since[1]) / max(stats.verified - since[0], 1)

    unlearned = made(loaded, drafter, fixed_drafts=3)
    plain = {result.id: result.token_ids for result in unlearned.run(iter(job(60, prompts=1)))}
    # On a busy machine what runs when nothing else wants to may not run for minutes.
    monkeypatch.setattr(adapt, "_yield_to_others", lambda: None)
    monkeypatch.setattr(adapt, "AdaptConfig", functools.partial(AdaptConfig, **QUICK))
    engine = made(loaded, drafter, adapt=True, fixed_drafts=3)
    assert engine._changes.adapting is not None
    adapter = engine._changes.adapting[1]
    learned = 0.0
    for part in range(8):
        swapped, drafted = adapter.swaps, (engine.stats().verified, engine.stats().accepted)
        requests = [Request(f"{part}-{request.id}", *(request.prompt_token_ids, request.sampling)) for request in job(60, prompts=1)]
        answers = {result.id: result.token_ids for result in engine.run(iter(requests))}
        assert answers == {f"{part}-{name}": tokens for name, tokens in plain.items()}
        adapter.join()
        if swapped:
            learned = share(engine, drafted)
            break
    assert adapter.swaps >= 1
    assert learned > share(unlearned) + 0.2
