"""`longdraft models list`: what is here, and what runs it."""

from __future__ import annotations

from pathlib import Path

from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from engine.checkpoints.packaged import PACKAGED
from engine.checkpoints.sources import CONVERSION
from service.cli.main import app
from service.cli.models import listing
from service.config import ModelEntry, Settings


def settings(tmp_path: Path) -> Settings:
    gemma = PACKAGED["gemma3-270m"]
    kinds = {
        "lean": ("qwen3", tmp_path / "lean"),
        "other": ("gpt_neox", tmp_path / "other"),
        "vision": ("gemma3", tmp_path / "vision"),
        "gemma3-270m": ("gemma3_text", tmp_path / "cache" / "models" / f"gemma3-270m-{gemma.revision}-v{CONVERSION}"),
    }
    for model_type, folder in kinds.values():
        folder.mkdir(parents=True)
        CONFIG_MAPPING[model_type]().save_pretrained(folder)
    # An earlier conversion of a packaged model is not what would be used.
    (tmp_path / "cache" / "models" / "smollm2-135m-000000000000-v0").mkdir()
    models = {name: ModelEntry(source=str(tmp_path / name)) for name in ("lean", "other", "vision")}
    models |= {name: ModelEntry(source=name) for name in PACKAGED}
    models["hub"] = ModelEntry(source="nobody/has-this-model")
    return Settings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", models=models)


def test_every_model_says_what_runs_it_and_where_it_is(tmp_path: Path) -> None:
    rows = {row["id"]: (row["packaged"], row["runs_on"], row["state"]) for row in listing(settings(tmp_path))}
    assert next(iter(rows)) == "smollm2-135m", "the default model comes first"
    assert rows["smollm2-135m"] == (True, None, "not fetched yet")
    assert rows["gemma3-270m"][:2] == (True, "lean decoder (gemma3_text)")
    assert rows["lean"] == (False, "lean decoder (qwen3)", str(tmp_path / "lean"))
    assert rows["other"] == (False, "transformers' code (gpt_neox): slower, exact; checked when loaded", str(tmp_path / "other"))
    assert rows["vision"][1] == "refused: gemma3 has a vision tower; only models of text alone can be served"
    assert rows["hub"] == (False, None, "Hugging Face hub, fetched when first used")


def test_the_command_prints_them(tmp_path: Path) -> None:
    CONFIG_MAPPING["gpt_neox"]().save_pretrained(tmp_path)
    config = tmp_path / "longdraft.toml"
    config.write_text(f'[models.other]\nsource = "{tmp_path}"\n')
    environment = {"LONGDRAFT_CONFIG": str(config), "LONGDRAFT_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "400"}
    shown = CliRunner().invoke(app, ["models", "list"], env=environment)
    assert shown.exit_code == 0, shown.output
    assert "slower, exact" in shown.output
    assert "packaged" in shown.output
