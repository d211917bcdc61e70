"""What `auto` finds: a registered drafter serves the model, and the revision of it, that its record names."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from engine.checkpoints import DEFAULT_MODEL, LoadedModel, fetch, load_model
from engine.checkpoints.packaged import PACKAGED
from engine.checkpoints.sources import CONVERSION
from engine.config import EngineConfig
from engine.drafters import sources
from engine.engine import Engine
from engine.training.export import write_folder
from engine.training.module import BlockModule
from engine.training.run import Recipe, block_spec, drafter_config
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("target") / "tiny")))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "registry_folders", lambda: [tmp_path / "mine", tmp_path / "shipped"])
    return tmp_path


def register(loaded: LoadedModel, folder: Path, **record: object) -> Path:
    config = drafter_config(loaded, Recipe(layers=1, block_size=4, rank=4))
    return write_folder(folder, config, BlockModule(block_spec(config)).tensors(), {"name": folder.name, **record})


def test_a_drafter_serves_the_model_and_revision_that_it_was_trained_for(
    loaded: LoadedModel, registry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = loaded.model.spec
    register(loaded, registry / "shipped" / "right", target=spec.name, target_revision=spec.revision)
    register(loaded, registry / "shipped" / "other", target="another", target_revision=spec.revision)
    register(loaded, registry / "mine" / "any", target=spec.name)
    with caplog.at_level(logging.WARNING):
        register(loaded, registry / "shipped" / "stale", target=spec.name, target_revision="0123")
        found = sources.find_automatic(loaded.directory, spec)
    assert [source.name for source in found] == ["any", "right"]
    assert "trained for revision 0123 of tiny" in caplog.text
    assert sources.named("stale", spec).name == "stale"
    engine = Engine(loaded, EngineConfig(kv_bytes=4 << 20))
    assert engine.drafters.members == ("suffix", "any", "right")


def test_a_drafter_of_another_shape_is_passed_over_with_the_reason(
    loaded: LoadedModel, registry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = loaded.model.spec
    folder = register(loaded, registry / "shipped" / "wide", target=spec.name, target_revision=spec.revision)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with caplog.at_level(logging.WARNING):
        assert Engine(loaded, EngineConfig(kv_bytes=4 << 20)).drafters.members == ("suffix",)
    assert "the drafter wide" in caplog.text


def test_the_converted_folder_of_a_packaged_model_is_that_model(tmp_path: Path) -> None:
    model = PACKAGED[DEFAULT_MODEL]
    folder = make_tiny_model(tmp_path / f"{model.name}-{model.revision}-v{CONVERSION}")
    found = fetch(str(folder))
    assert (found.name, found.revision, found.directory) == (DEFAULT_MODEL, model.revision, folder)
    other = make_tiny_model(tmp_path / f"{model.name}-0123456789ab-v{CONVERSION}")
    assert fetch(str(other)).name == other.name
