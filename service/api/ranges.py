"""The Range header of one part (RFC 9110, section 14), pure."""

from __future__ import annotations

import re

from service.errors import LongdraftError
from service.usecases.files import Slice

_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*", re.IGNORECASE)


class RangeNotSatisfiable(LongdraftError):
    """The range begins behind the end of the file."""

    code, status, type = "range_not_satisfiable", 416, "invalid_request_error"

    def __init__(self, header: str, size: int) -> None:
        super().__init__(f"The range {header!r} lies outside the file's {size} bytes.")
        self.size = size


def parse_range(header: str | None, size: int) -> Slice | None:
    """What to send: a slice, or None for the whole file (no header, several ranges, or a malformed one: RFC 9110 lets us ignore it).

    Raises:
        RangeNotSatisfiable: nothing of the file lies in the range.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None:
        return None
    first, last = match[1], match[2]
    if not first and not last:
        return None
    if not first:
        start, stop = max(size - int(last), 0), size
    else:
        start = int(first)
        stop = min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size or stop <= start:
        raise RangeNotSatisfiable(match[0], size)
    return Slice(start, stop)
