"""The registered models: what they are called, where they come from, whether they are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.cli.output import Failure, note
from service.config import ModelEntry, Settings

_ABSENT = "not fetched yet"


def catalogue(settings: Settings) -> list[dict[str, Any]]:
    """One record a model, the default one first."""
    names = sorted(settings.models, key=lambda name: (name != settings.default_model, name))
    return [_record(name, settings.models[name], settings) for name in names]


def listing(settings: Settings) -> list[dict[str, Any]]:
    """As `catalogue`, with what each model runs on, as far as this machine has an engine that can tell."""
    rows = catalogue(settings)
    try:
        from service.adapters.engine_runner.catalogue import is_packaged, look
    except ImportError:
        return [row | {"packaged": None, "runs_on": None} for row in rows]
    for row in rows:
        entry = settings.models[row["id"]]
        folder, row["runs_on"] = look(entry, settings.cache_dir)
        row["packaged"] = is_packaged(entry)
        if folder is not None:
            row["state"] = str(folder)
        elif row["packaged"]:
            row["state"] = _ABSENT
    return rows


def pull(settings: Settings, model: str | None) -> Path:
    """Fetches a registered model and returns its folder. Raises Failure for an unknown name."""
    name = settings.default_model if model is None else settings.resolve_model(model)
    if name is None:
        raise Failure(f"No model is registered as {model!r}; known: {', '.join(settings.models)}. Others go into longdraft.toml.")
    from service.adapters.engine_runner import checkpoint_folder

    return checkpoint_folder(settings.models[name], settings.cache_dir, note)


def _record(name: str, entry: ModelEntry, settings: Settings) -> dict[str, Any]:
    return {
        "id": name,
        "aliases": list(entry.aliases),
        "source": entry.source,
        "revision": entry.revision,
        "default": name == settings.default_model,
        "state": _state(entry, settings.cache_dir),
    }


def _state(entry: ModelEntry, cache_dir: Path) -> str:
    """Seen without loading the engine: the API's machine has none."""
    path = Path(entry.source).expanduser()
    if path.exists():
        return str(path)
    if "/" in entry.source:
        return "Hugging Face hub, fetched when first used"
    found = sorted((cache_dir / "models").glob(f"{entry.source}-*"))
    return str(found[-1]) if found else _ABSENT
