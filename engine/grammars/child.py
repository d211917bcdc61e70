"""The process that compiles grammars: with limits on time and memory that a hostile schema cannot get past, and nothing else to lose.

Frames on stdin and stdout: a length (4 bytes, big-endian) and that many bytes. First comes the vocabulary (pickled by the parent), which is
answered with an empty frame; then grammars as JSON, each answered with `+` and the compiled grammar or `-` and what is wrong.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
import tempfile
from typing import IO, Any

from engine.grammars.frames import Limits, read_frame, write_frame


def main() -> None:
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not part of an answer
    from engine.grammars import backend

    if (first := read_frame(incoming)) is None:
        return  # whoever started us is gone
    vocabulary, limits = pickle.loads(first)  # noqa: S301 - from our parent, over a pipe of ours
    info = backend.token_info(vocabulary)
    with tempfile.TemporaryFile() as complaints:
        os.dup2(complaints.fileno(), 2)
        _limit_memory(limits.memory_bytes)
        write_frame(outgoing, b"")
        while (frame := read_frame(incoming)) is not None:
            write_frame(outgoing, _answer(backend, info, json.loads(frame), complaints, limits))


def _answer(backend: Any, info: Any, asked: dict[str, str], complaints: IO[bytes], limits: Limits) -> bytes:
    from engine.types import Grammar, GrammarKind

    complaints.truncate(0)
    complaints.seek(0)
    signal.setitimer(
        signal.ITIMER_PROF, limits.cpu_seconds
    )  # nobody handles SIGPROF: it ends the process, in the middle of whatever it does
    try:
        compiled = backend.compile_grammar(info, Grammar(GrammarKind(asked["kind"]), asked["text"])).encode()
    except backend.GrammarError as error:
        return b"-" + str(error).encode()
    except MemoryError:
        return b"-it takes too much memory to compile"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    complaints.seek(0)
    for line in complaints.read().decode(errors="replace").splitlines():
        if "Warning: " in line:  # the library says what it leaves out, and goes on
            return b"-" + line.partition("Warning: ")[2][:300].encode()
    if len(compiled) > limits.compiled_bytes:
        return b"-compiled, it is too large"
    return b"+" + compiled


def _limit_memory(more: int) -> None:
    with open("/proc/self/statm") as file:  # noqa: PTH123 - a pseudo-file
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


if __name__ == "__main__":
    main()
