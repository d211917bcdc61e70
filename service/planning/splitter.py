"""Bytes in any portions -> lines, holding no more than one line of permitted length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"
_SLACK = len(BOM) + len(b"\r")


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line as it lies in the input: number from 1, byte offset and length without BOM and line end.

    `data` is None where the line is longer than allowed: its bytes were counted and dropped.
    """

    line_no: int
    offset: int
    length: int
    data: bytes | None

    @property
    def blank(self) -> bool:
        return self.data is not None and not self.data.strip()


class LineSplitter:
    """Splits at `\\n` alone (U+2028 and friends are text), taking a `\\r` before it and one leading UTF-8 BOM away."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._parts: list[bytes] = []
        self._held = 0
        """Length of the open line, dropped bytes included."""
        self._start = 0
        self._line_no = 0

    def feed(self, chunk: bytes) -> Iterator[RawLine]:
        """The lines that `chunk` completes. Exhaust the iterator before feeding more."""
        position = 0
        while (end := chunk.find(b"\n", position)) >= 0:
            self._hold(chunk[position:end])
            yield self._close()
            position = end + 1
        self._hold(chunk[position:])

    def finish(self) -> Iterator[RawLine]:
        """The last line, if the input does not end in a newline."""
        if self._held:
            yield self._close()

    def _hold(self, part: bytes) -> None:
        self._held += len(part)
        if self._held > self._max + _SLACK:
            self._parts.clear()
        elif part:
            self._parts.append(part)

    def _close(self) -> RawLine:
        self._line_no += 1
        start, held = self._start, self._held
        data = None if held > self._max + _SLACK else b"".join(self._parts)
        self._parts.clear()
        self._start, self._held = start + held + 1, 0
        if data is None:
            return RawLine(self._line_no, start, held, None)
        if self._line_no == 1 and data.startswith(BOM):
            data, start = data[len(BOM) :], start + len(BOM)
        data = data.removesuffix(b"\r")
        return RawLine(self._line_no, start, len(data), data if len(data) <= self._max else None)
