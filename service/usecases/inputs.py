"""Input files on a worker's scratch disk: each object is fetched once, compared with its recorded hash, and then read by range."""

from __future__ import annotations

import hashlib
import tempfile
from collections import OrderedDict
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO

from service.errors import BlobCorrupt, Unavailable
from service.ports import BlobStore

READ_BYTES = 1 << 20
KEEP_BYTES = 4 << 30
"""Scratch space before files that were not read for longest are dropped."""


class InputFiles:
    """A cache of input objects. One thread; close it (or leave the block) to remove the files."""

    def __init__(self, blobs: BlobStore, *, keep_bytes: int = KEEP_BYTES) -> None:
        self._blobs = blobs
        self._keep_bytes = keep_bytes
        self._open: OrderedDict[str, tuple[BinaryIO, int]] = OrderedDict()

    def __enter__(self) -> InputFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for file, _ in self._open.values():
            file.close()
        self._open.clear()

    def read(self, key: str, sha256: str | None, offset: int, length: int) -> bytes:
        """`length` bytes of the object from `offset`.

        Raises:
            BlobNotFound: the object is gone.
            BlobCorrupt: its bytes are not the ones that were recorded, or it ends early.
            Unavailable: the store does not answer, or the scratch disk is full.
        """
        if key not in self._open:
            self._open[key] = self._fetch(key, sha256)
            self._make_room(key)
        self._open.move_to_end(key)
        file, _ = self._open[key]
        file.seek(offset)
        data = file.read(length)
        if len(data) != length:
            raise BlobCorrupt(f"Object {key!r} ends before byte {offset + length}.")
        return data

    def _fetch(self, key: str, sha256: str | None) -> tuple[BinaryIO, int]:
        digest, size = hashlib.sha256(), 0
        with ExitStack() as undo:
            try:
                # Has no name: whatever ends this process, the disk gets the space back.
                file = undo.enter_context(tempfile.TemporaryFile())
                with self._blobs.open(key) as stream:
                    while portion := stream.read(READ_BYTES):
                        digest.update(portion)
                        size += len(portion)
                        file.write(portion)
                file.flush()
            except OSError as error:
                raise Unavailable(f"Object {key!r} does not fit the scratch disk: {error.strerror or error}.") from error
            if sha256 is not None and digest.hexdigest() != sha256:
                raise BlobCorrupt(f"Object {key!r} has SHA-256 {digest.hexdigest()}; {sha256} was recorded.")
            undo.pop_all()
        return file, size

    def _make_room(self, newest: str) -> None:
        total = sum(size for _, size in self._open.values())
        for key in list(self._open):
            if total <= self._keep_bytes or key == newest:
                break
            file, size = self._open.pop(key)
            file.close()
            total -= size
