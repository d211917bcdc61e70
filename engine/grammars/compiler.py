"""Grammars compiled in a process of their own, one after the other, each once: nobody waits for a schema but the lines that have it."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.grammars.errors import GrammarError
from engine.grammars.frames import Limits, read_frame, write_frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.grammars.vocabulary import Vocabulary
    from engine.types import Grammar

_KEPT = 512
"""Compiled grammars that are kept, and refusals. Most take under 1 MB."""


class Compiler:
    """One per engine. `submit` may be called from any thread. The process starts with the first grammar and ends with this object."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        """vocabulary: called once, when it is first needed. limits: of one grammar."""
        self._limits = limits
        self._find_vocabulary = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._info: Any = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._known: OrderedDict[Grammar, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, self._thread.shutdown, wait=False, cancel_futures=True)

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = self._find_vocabulary()
        return self._vocabulary

    def submit(self, grammar: Grammar) -> Future[Any]:
        """The compiled grammar, for `engine.grammars.backend.Matcher`, or GrammarError, when it is there."""
        with self._lock:
            if grammar not in self._known:
                self._known[grammar] = self._thread.submit(_compile, weakref.proxy(self), grammar)
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(grammar)
            return self._known[grammar]

    def compile(self, grammar: Grammar) -> Any:
        """Waits for it. Raises GrammarError."""
        return self.submit(grammar).result()

    def run(self, grammar: Grammar) -> Any:
        """In the compiler's own thread."""
        try:
            from engine.grammars import backend
        except ImportError as error:
            raise GrammarError(f"this worker cannot compile grammars: {error}; install xgrammar") from None
        if self._info is None:
            self._info = backend.token_info(self.vocabulary)
        return backend.load(self._info, self._ask(grammar).decode())

    def _ask(self, grammar: Grammar) -> bytes:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            write_frame(process.stdin, json.dumps({"kind": grammar.kind.value, "text": grammar.text}).encode())
            answer = read_frame(process.stdout)
        except BrokenPipeError:
            answer = None
        if answer is None:
            status = process.wait()
            self._process = None
            if status == -signal.SIGPROF:
                raise GrammarError(f"it takes more than {self._limits.cpu_seconds:g} s to compile")
            raise GrammarError("it takes too much memory to compile")
        if answer[:1] == b"-":
            raise GrammarError(answer[1:].decode(errors="replace"))
        return answer[1:]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-m", "engine.grammars.child"]
            root = Path(__file__).parents[2]
            # A session of its own: what is typed at a terminal is meant for us.
            process = subprocess.Popen(  # noqa: S603 - our own program
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, start_new_session=True
            )
            weakref.finalize(self, _end, process)
            assert process.stdin is not None
            assert process.stdout is not None
            write_frame(process.stdin, pickle.dumps((self.vocabulary, self._limits)))
            if read_frame(process.stdout) is None:
                raise RuntimeError(f"the process that compiles grammars ended at its start with status {process.wait()}")
            self._process = process
        return self._process


def _compile(compiler: Compiler, grammar: Grammar) -> Any:
    """Apart from the object, so that the thread does not keep it alive."""
    return compiler.run(grammar)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
