"""The drafters that come with Longdraft: small, packaged, found without a flag, and made from no prompt that they are judged by."""

from __future__ import annotations

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.checkpoints.drafters.folder import read_folder
from engine.checkpoints.drafters.formats import block_spec
from engine.checkpoints.packaged import DEFAULT_MODEL, PACKAGED
from engine.drafters import sources
from engine.drafters.sources import SHIPPED, find_automatic
from engine.training.provenance import leaks, read_provenance

ROOT = Path(__file__).parents[4]
OF_DEFAULT = SHIPPED / f"{DEFAULT_MODEL}-dspark"
FOLDERS = sorted(path for path in SHIPPED.iterdir() if path.is_dir())


def test_the_default_model_has_one() -> None:
    assert OF_DEFAULT in FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_it_is_small_packaged_and_declares_what_it_shares_with_the_target(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "calibration.json", "longdraft_drafter.json", "prompts.json", "evaluation.json"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) <= 40_000_000
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["engine.drafters"]
    for path in files:
        assert any(fnmatch(str(path.relative_to(SHIPPED.parent)), pattern) for pattern in patterns), path
    found = read_folder(folder)
    tensors = found.tensors()
    assert found.config["shared_with_target"] == ["embed_tokens.weight", "lm_head.weight"]
    assert not set(found.config["shared_with_target"]) & set(tensors)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16"}
    assert 0 < block_spec(found.config).markov_rank <= 128


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_no_benchmark_prompt_and_none_of_the_kept_tenth_was_trained_or_calibrated_on(folder: Path) -> None:
    record = read_provenance(folder)
    assert leaks(record) == []
    assert min(len(record[use]) for use in ("trained", "calibrated", "judged", "benchmarks")) > 50
    assert len(record["trained"]) <= read_folder(folder).record["texts"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_it_was_calibrated_and_judged(folder: Path) -> None:
    found = read_folder(folder)
    assert {"0", "2"} <= set(found.calibration["temperatures"])
    judged = json.loads((folder / "evaluation.json").read_text())["temperatures"]
    row = judged["0"]["drafters"][found.name]
    assert set(row) >= {"math", "code", "chat", "macro"}
    assert row["macro"] > max(judged["0"]["drafters"][name]["macro"] for name in ("ngram", "suffix"))


def test_the_default_model_uses_it_without_a_flag_and_no_other_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "registry_folders", lambda: [SHIPPED])
    import torch

    def found(name: str, revision: str) -> list[str]:
        spec = SimpleNamespace(name=name, revision=revision, dtype=torch.float32, num_layers=30)
        return [source.name for source in find_automatic(tmp_path, spec)]

    revision = PACKAGED[DEFAULT_MODEL].revision
    assert found(DEFAULT_MODEL, revision) == [OF_DEFAULT.name]
    assert found(DEFAULT_MODEL, "0123456789ab") == []
    assert found("another", revision) == []
