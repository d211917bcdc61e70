"""A target that is trained for."""

from __future__ import annotations

import pytest

from engine.checkpoints import LoadedModel, load_model
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(make_tiny_model(tmp_path_factory.mktemp("target") / "tiny")))
