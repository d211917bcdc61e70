"""Machine code of compiled kernels, kept on disk: a model's take seconds to compile at every start, and a moment to read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

_MOST = 1024
"""Files, of tens of kilobytes each. Beyond, the one that was used longest ago goes."""
_DIGEST = hashlib.sha256().digest_size


class Objects:
    """Object files in `folder`, which is made when the first is kept, each behind its own checksum.

    A folder that cannot be used costs the compilation only: nothing is raised for it. What others could have written is not run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> bytes | None:
        """None where there is none, or what there is was cut short or spoilt."""
        path = self._folder / key
        try:
            if not _ours(self._folder) or not _ours(path):
                return None
            found = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        code = found[_DIGEST:]
        return code if hashlib.sha256(code).digest() == found[:_DIGEST] else None

    def put(self, key: str, code: bytes) -> None:
        """Whole or not at all, whoever else does the same."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(prefix=".", dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(code).digest() + code)
                Path(scratch).replace(self._folder / key)
            except BaseException:
                Path(scratch).unlink(missing_ok=True)
                raise
            self._make_room()

    def _make_room(self) -> None:
        kept = [entry for entry in os.scandir(self._folder) if entry.is_file()]
        if len(kept) > _MOST:
            for entry in sorted(kept, key=lambda entry: entry.stat().st_mtime)[: len(kept) - _MOST]:
                Path(entry.path).unlink(missing_ok=True)


def _ours(path: Path) -> bool:
    """Whether nobody but this user and group can have written what lies here (a volume of Kubernetes is its group's to write)."""
    about = path.stat()
    open_to = 0o002 if about.st_gid == os.getegid() else 0o022
    return about.st_uid == os.geteuid() and not about.st_mode & open_to
