"""A job that wants more KV cache than it gets: `python -m tests.benchmarks.memory_budget [--budget-gib 1] [--wants-gib 4] [--json]`.

Makes as many long requests as would fill `--wants-gib` of cache if all ran at once, gives the engine `--budget-gib`, and runs them. Goals:
every line is answered, the cache in use never passes its budget, and the process grows, over what it holds once the model is loaded, by no
more than the budget and what a step needs.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from random import Random

from engine.config import EngineConfig
from engine.types import Request, SamplingParams
from tests.benchmarks import live

GIB = 1 << 30
_SLACK = GIB // 4
"""Of a step's activations, and the allocator's."""


def main() -> int:
    parser = live.arguments(__doc__)
    parser.add_argument("--budget-gib", type=float, default=1.0)
    parser.add_argument("--wants-gib", type=float, default=4.0)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    options = parser.parse_args()
    loaded = live.load(options)
    spec = loaded.model.spec
    token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
    length = int(options.wants_gib * GIB / token_bytes / options.sequences)
    if length > spec.max_positions or length <= options.answer:
        parser.error(f"{options.sequences} sequences would have {length} tokens each; the model takes {spec.max_positions}: try others")
    rng = Random(0)
    asked = [
        Request(
            str(number),
            tuple(rng.randrange(100, spec.vocab_size) for _ in range(length - options.answer)),
            SamplingParams(max_tokens=options.answer, temperature=0.0, ignore_eos=True),
        )
        for number in range(options.sequences)
    ]
    before = held()
    forget_peak()
    config = EngineConfig(kv_bytes=int(options.budget_gib * GIB), max_sequences=options.sequences)
    done = live.run(loaded, config, asked, f"{options.budget_gib:g} GiB")
    grown = peak() - before
    budget = int(options.budget_gib * GIB)
    result = {
        "benchmark": "memory budget",
        "budget_bytes": budget,
        "wanted_bytes": options.sequences * length * token_bytes,
        "kv_peak_bytes": done.kv_peak_bytes,
        "grown_bytes": grown,
        "answered": [len(done.results), options.sequences],
        "preemptions": done.stats.preemptions,
        "seconds": round(done.seconds, 2),
        "tokens_per_second": round(done.tokens_per_second, 2),
        "pass": len(done.results) == options.sequences and done.kv_peak_bytes <= budget and grown <= budget + _SLACK,
    }
    return live.report(result, as_json=options.as_json)


def held() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    """The most that was ever held is what is held now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of memory that the process had at most since then; unlike `ru_maxrss`, nothing of the process that it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
