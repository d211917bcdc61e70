"""Converted models and machine profiles in a blob store, so that a machine that starts from nothing finds them made."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import structlog

from service.errors import BlobNotFound, LongdraftError
from service.ports import BlobStore

MANIFEST = "manifest.json"
"""Written last: a folder without one is not whole, and does not exist."""
PORTION = 1 << 20

log = structlog.get_logger(__name__)


class BlobFolders:
    """engine.checkpoints.cache.SharedFolders on a BlobStore: `<kind>/<name>/<file>`, and a manifest with sizes and checksums.

    Loading a model must not depend on it: whatever goes wrong is logged, and the folder is made here.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def get(self, name: str, folder: Path) -> bool:
        try:
            with self._blobs.open(f"{name}/{MANIFEST}") as stream:
                manifest = json.loads(stream.read())
            for file, expected in manifest["files"].items():
                if Path(file).name != file:
                    raise ValueError(f"{file!r} is no name of a file")  # noqa: TRY301 - joins what else may be wrong
                self._fetch(f"{name}/{file}", folder / file, expected)
        except BlobNotFound:
            _empty(folder)
            return False
        except (LongdraftError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("shared_cache_unusable", folder=name, error=str(error))
            _empty(folder)
            return False
        log.info("shared_cache_hit", folder=name, files=len(manifest["files"]))
        return True

    def put(self, name: str, folder: Path) -> None:
        try:
            files = {}
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                with path.open("rb") as source, self._blobs.writer(f"{name}/{path.name}") as out:
                    while portion := source.read(PORTION):
                        out.write(portion)
                    files[path.name] = out.commit().sha256
            self._blobs.put(f"{name}/{MANIFEST}", json.dumps({"files": files}).encode())
        except (LongdraftError, OSError) as error:
            log.warning("shared_cache_not_filled", folder=name, error=str(error))

    def _fetch(self, key: str, path: Path, expected: str) -> None:
        """Raises ValueError where the bytes are not those that were put there."""
        digest = hashlib.sha256()
        with self._blobs.open(key) as stream, path.open("wb") as out:
            while portion := stream.read(PORTION):
                digest.update(portion)
                out.write(portion)
        if digest.hexdigest() != expected:
            raise ValueError(f"{key} has SHA-256 {digest.hexdigest()}, its manifest says {expected}")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
