"""transformers' continuous batching beside the engine, in a process of its own: whatever it does, the benchmark goes on.

The process (`python -m tests.benchmarks.gpu_peer MODEL JOB SIZE`) loads its modules, waits for a line on its standard input, runs the job
with one setting after the other, and prints a JSON object whenever a request has ended. Attention is the best that transformers finds on
the machine: flash attention where a package for it is installed, else torch's, which reads the keys of all requests of a batch for each of
them, so that fewer requests at a time can be faster: several widths are tried. Compiling the model, which takes minutes, is not.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BLOCK = 256
"""Tokens of a block of its cache: its default."""


@dataclass(frozen=True)
class Job:
    """`requests` random prompts of `prompt` tokens, `answer` tokens each. widths: requests at a time, one setting after the other.

    step_tokens: of a step of the peer's, at most: a prompt's chunk is held against the keys of everybody in its step.
    """

    requests: int
    prompt: int
    answer: int
    widths: tuple[int, ...]
    step_tokens: int


@dataclass(frozen=True)
class Ran:
    """A setting's best so far: `tokens` in `seconds`, when `done` of the job's requests had ended."""

    width: int
    done: int
    tokens: int
    seconds: float
    attention: str

    @property
    def rate(self) -> float:
        """Tokens a second, of answers that had ended."""
        return self.tokens / self.seconds

    def most(self, job: Job) -> float:
        """Tokens a second if every request that can have been under way when time was over had been as good as ended."""
        return (self.tokens + min(self.width, job.requests - self.done) * job.answer) / self.seconds


class Peer:
    """Starts at once, so that loading modules costs nobody time; `run` begins."""

    def __init__(self, model: str, job: Job, *, tiny: bool) -> None:
        self._job = job
        command = [sys.executable, "-m", "tests.benchmarks.gpu_peer", model, json.dumps(asdict(job)), "tiny" if tiny else "full"]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def run(self, limit: float) -> list[Ran]:
        """How far each setting got within `limit` seconds, loading the model included."""
        until = time.monotonic() + limit
        found: dict[int, Ran] = {}
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and said why on stderr
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        while (left := until - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                break
            with contextlib.suppress(json.JSONDecodeError):  # something else that it printed
                ran = Ran(**json.loads(line))
                found[ran.width] = ran
        self.stop()
        return list(found.values())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def note(ran: Ran, job: Job) -> str:
    finished = ""
    if ran.done < job.requests:
        finished = f", stopped after {ran.done} of {job.requests} requests: at most {ran.most(job):.0f} tokens/s with those under way"
    return f"{ran.width} requests and {job.step_tokens} tokens a step at most, {ran.attention}{finished}"


def hf_model(name: str, place: Any, *, tiny: bool) -> Any:
    """transformers' own modules with random weights, made where they run."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.benchmarks.gpu_models import config_of

    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    with torch.device(place):
        return AutoModelForCausalLM.from_config(config_of(name, tiny=tiny), dtype=dtype).eval()


def main() -> None:
    import torch
    import transformers  # noqa: F401 - before it is told to begin

    name, fields, size = sys.argv[1:]
    job = Job(**json.loads(fields))
    if not sys.stdin.readline():
        return
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = hf_model(name, place, tiny=size == "tiny")
    vocab = model.config.vocab_size
    prompts = torch.randint(3, vocab, (job.requests, job.prompt), generator=torch.Generator().manual_seed(1)).tolist()
    for width in job.widths:
        try:
            run(model, prompts, job, width)
        except Exception:  # noqa: BLE001 - a setting that this machine has no room for; the others may do
            traceback.print_exc()


def run(model: Any, prompts: list[list[int]], job: Job, width: int) -> None:
    """The job with `width` requests at a time; prints what it has whenever one has ended."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    wanted = GenerationConfig(max_new_tokens=job.answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(
        num_blocks=2 * width * -(-(job.prompt + job.answer) // BLOCK),  # a fraction of them it keeps free
        max_batch_tokens=job.step_tokens,
        max_requests_per_batch=width,
        allow_block_sharing=False,  # no two prompts have anything in common
    )
    with model.continuous_batching_context_manager(generation_config=wanted, continuous_batching_config=settings) as manager:
        attention = str(model.config._attn_implementation)
        for measured, answer in ((prompts[:2], 2), (prompts, job.answer)):  # the first two load its kernels
            started, done, tokens = time.perf_counter(), 0, 0
            manager.add_requests(inputs=measured, max_new_tokens=answer)
            while done < len(measured):
                output = manager.get_result(timeout=1)
                if output is None:
                    if not manager.is_running():
                        raise RuntimeError("the continuous batching thread has ended")
                    continue
                if output.error is not None:
                    raise RuntimeError(output.error)
                done, tokens = done + 1, tokens + len(output.generated_tokens)
                if measured is prompts:
                    ran = Ran(width, done, tokens, time.perf_counter() - started, attention)
                    sys.stdout.write(json.dumps(asdict(ran)) + "\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
