"""Folders that are made once, by whoever comes first, and are whole or absent."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class SharedFolders(Protocol):
    """Where machines share folders that took time to make. `name` is the kind and the folder's own name: `models/x`."""

    def get(self, name: str, folder: Path) -> bool:
        """Fills the empty `folder`; False, and nothing in it, where there is no such folder or it cannot be had."""
        ...

    def put(self, name: str, folder: Path) -> None:
        """Shares a folder. A failure is not the caller's problem: somebody else will make it again."""
        ...


def make_once(target: Path, build: Callable[[Path], None], shared: SharedFolders | None = None) -> Path:
    """Returns `target`, after `build` has filled it if it did not exist, here or in `shared`.

    `build` gets an empty folder beside `target`, which is renamed into place when it returns: a crash leaves nothing that looks
    finished. Processes that want the same folder wait for each other on a lock file.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return target
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            name = f"{target.parent.name}/{target.name}"
            found = shared is not None and shared.get(name, scratch)
            if not found:
                build(scratch)
            scratch.chmod(0o755)
            scratch.rename(target)
            if shared is not None and not found:
                shared.put(name, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
