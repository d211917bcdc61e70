"""What goes between the engine and the process that compiles grammars."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one grammar: a schema of 5,000 enum values takes 0.3 s. `memory_bytes`: beyond what the process needs before the first."""

    cpu_seconds: float = 4.0
    memory_bytes: int = 1 << 30
    compiled_bytes: int = 24 << 20


def read_frame(stream: IO[bytes]) -> bytes | None:
    """None at the end of the stream, whole frames only."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack(">I", head)
    data = stream.read(length)
    return data if len(data) == length else None


def write_frame(stream: IO[bytes], data: bytes) -> None:
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()
