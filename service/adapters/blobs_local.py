"""Objects as files under one folder: written aside, synced, renamed, so a reader or a crash never meets half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from service.adapters.blob_parts import Slice, Tally, check_key, round_trip
from service.errors import BlobCorrupt, BlobNotFound, InvalidRequest, Unavailable
from service.ports import BlobInfo

INCOMING = ".incoming"
"""Unfinished puts; on the same file system as the objects, since only there a rename is atomic."""
RENAME_TRIES = 100


class LocalBlobStore:
    """ports.BlobStore on a directory. Several processes may share it."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        with _outages(f"The folder {self._root} cannot be used"):
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._root / INCOMING).mkdir(mode=0o700, exist_ok=True)

    def writer(self, key: str) -> LocalWriter:
        return LocalWriter(self._root, key, self._path(key))

    def put(self, key: str, data: bytes) -> BlobInfo:
        with self.writer(key) as writer:
            writer.write(data)
            return writer.commit()

    def open(self, key: str, *, start: int = 0, length: int | None = None) -> BinaryIO:
        path = self._path(key)
        with _outages(f"Object {key!r} cannot be read"):
            try:
                stream = path.open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise BlobNotFound(f"No object under {key!r}.") from None
            stream.seek(start)
        return stream if length is None else io.BufferedReader(Slice(stream, length))

    def head(self, key: str) -> BlobInfo | None:
        """The SHA-256 is not kept beside the file: None."""
        path = self._path(key)
        return BlobInfo(key, path.stat().st_size, None) if path.is_file() else None

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _outages(f"Object {key!r} cannot be deleted"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
            for folder in path.parents:
                if folder == self._root:
                    break
                try:
                    folder.rmdir()
                except OSError:  # not empty, or somebody else was faster
                    break

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        with _outages(f"Objects under {prefix!r} cannot be listed"):
            for path in _files(self._root / prefix.rpartition("/")[0]):
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and not key.startswith(f"{INCOMING}/"):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        yield BlobInfo(key, path.stat().st_size, None)

    def probe(self) -> Mapping[str, str]:
        return {"store": "directory", "folder": str(self._root), **round_trip(self)}

    def discard_abandoned(self, older_than: timedelta) -> int:
        before, removed = time.time() - older_than.total_seconds(), 0
        for path in (self._root / INCOMING).iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()
                    removed += 1
        return removed

    def _path(self, key: str) -> Path:
        if check_key(key).startswith(f"{INCOMING}/"):
            raise InvalidRequest(f"{key!r} is not a storage key: {INCOMING} is the store's own.")
        return self._root / key


class LocalWriter:
    """ports.BlobWriter: a file in `.incoming` until `commit`."""

    def __init__(self, root: Path, key: str, target: Path) -> None:
        self._root, self._key, self._target = root, key, target
        self._temporary = root / INCOMING / uuid.uuid4().hex
        self._tally = Tally()
        with _outages(f"Object {key!r} cannot be written"):
            descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "w+b")

    def write(self, data: bytes | memoryview) -> None:
        with _outages(f"Object {self._key!r} cannot be written"):
            self._file.write(data)
        self._tally.add(data)

    def commit(self) -> BlobInfo:
        with _outages(f"Object {self._key!r} cannot be written"):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._verify()
            self._file.close()
            self._move()
        return self._tally.info(self._key)

    def __enter__(self) -> LocalWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed is not wanted
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _verify(self) -> None:
        self._file.seek(0)
        written = hashlib.file_digest(self._file, "sha256").hexdigest()
        if self._file.tell() != self._tally.bytes or written != self._tally.sha256:
            raise BlobCorrupt(f"Object {self._key!r}: the file system holds other bytes than were written ({self._file.tell()} bytes).")

    def _move(self) -> None:
        for attempt in range(RENAME_TRIES):
            try:
                self._target.parent.mkdir(parents=True, exist_ok=True)
                self._temporary.rename(self._target)
                break
            except (FileNotFoundError, FileExistsError):  # `delete` tidied the empty folder away, here or within mkdir
                if attempt == RENAME_TRIES - 1:
                    raise
        for folder in self._target.parents:  # a name survives a power cut only when its folder is synced
            _sync_folder(folder)
            if folder == self._root:
                break


def _files(folder: Path) -> Iterator[Path]:
    """All files below, in the order of their keys as bytes: `a.b` comes before `a/c`, since `.` comes before `/`."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((os.fsencode(entry.name) + b"/" * entry.is_dir(follow_symlinks=False), Path(entry.path)) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):  # tidied away meanwhile, or never there
        return
    for name, path in found:
        if name.endswith(b"/"):
            yield from _files(path)
        else:
            yield path


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # the object is already deleted again
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _outages(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = " Free some space." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise Unavailable(f"{what}: {error.strerror or error}.{hint}") from error
