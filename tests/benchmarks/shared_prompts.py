"""A big job with few system prompts: `python -m tests.benchmarks.shared_prompts [--lines 2000] [--prompts 10] [--json]`.

Makes the job (`--write FILE` keeps it), runs it with prefix sharing and a part of it without, and reports the share of prompt tokens that
came from the cache, both throughputs, and how long the last 5% of the lines took. Goals: the hit rate of a perfect cache less 2 points,
faster than without sharing, and a tail under 15% of the time.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from service.cli.bench.prompts import distinct_positions
from tests.benchmarks import live

TAIL, TAIL_GOAL = 0.05, 0.15
_RULES = ("Answer in one short sentence.", "Never mention prices.", "Use the metric system.", "Name the source of every figure.")
_SUBJECTS = ("orders", "invoices", "returns", "warranties", "deliveries", "stock", "complaints", "contracts", "refunds", "appointments")
_THINGS = ("drill", "ladder", "pump", "saw", "lamp", "heater", "valve", "filter", "hinge", "cable")
_PLACES = ("Graz", "Porto", "Leeds", "Ghent", "Siena", "Cork", "Tartu", "Lyon", "Basel", "Oslo")


def job(count: int, prompts: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` OpenAI batch lines, in random order, each with one of `prompts` system prompts of about 400 tokens."""
    rng = random.Random(seed)
    systems = [_system(number) for number in range(prompts)]
    return [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "any",
                "messages": [{"role": "system", "content": rng.choice(systems)}, {"role": "user", "content": _question(rng)}],
                "max_tokens": rng.choice((16, 24, 32, 48, 64)),
                "temperature": 0,
            },
        }
        for number in range(count)
    ]


def _system(number: int) -> str:
    rng = random.Random(f"system {number}")
    subject = _SUBJECTS[number % len(_SUBJECTS)]
    cases = (
        f"Case {case}: a customer in {rng.choice(_PLACES)} asks about {subject} of a {rng.choice(_THINGS)}; {rng.choice(_RULES).lower()}"
        for case in range(18)
    )
    return f"You are desk {number}, responsible for {subject}. " + " ".join([*rng.sample(_RULES, 3), *cases])


def _question(rng: random.Random) -> str:
    return f"My {rng.choice(_THINGS)} (number {rng.randrange(10**5)}) was sent to {rng.choice(_PLACES)}. What should I do next?"


def main() -> int:
    parser = live.arguments(__doc__)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--no-sharing-lines", type=int, default=200, help="how many of them run without sharing, for its rate")
    parser.add_argument("--write", type=Path, help="keep the job here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.write or Path(folder) / "job.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in job(options.lines, options.prompts)), encoding="utf-8")
        loaded = live.load(options)
        requests = live.read_requests([path], loaded)
    shared = live.run(loaded, EngineConfig(), requests, "sharing")
    part = live.run(loaded, EngineConfig(), requests[: options.no_sharing_lines], "sharing, the part")
    alone = live.run(loaded, EngineConfig(share_prefixes=False), requests[: options.no_sharing_lines], "no sharing")
    prompt = sum(len(request.prompt_token_ids) for request in requests)
    cached = sum(result.ledger.cached for result in shared.results)
    tail = 1.0 - shared.ends[len(shared.ends) - max(round(TAIL * len(shared.ends)), 1) - 1] / shared.seconds
    same = sum(alone.answers()[name] == tokens for name, tokens in part.answers().items())
    possible = 1.0 - distinct_positions(request.prompt_token_ids for request in requests) / prompt
    result = {
        "benchmark": "shared prompts",
        "lines": len(requests),
        "prompt_tokens": prompt,
        "hit_rate": round(cached / prompt, 4),
        "hit_rate_of_a_perfect_cache": round(possible, 4),
        "tokens_per_second": round(shared.tokens_per_second, 2),
        "lines_per_second": round(len(requests) / shared.seconds, 3),
        "part": {
            "lines": options.no_sharing_lines,
            "tokens_per_second": round(part.tokens_per_second, 2),
            "tokens_per_second_without_sharing": round(alone.tokens_per_second, 2),
            "ratio": round(part.tokens_per_second / alone.tokens_per_second, 3),
            "answers_equal": [same, len(part.results)],
        },
        "tail_share": round(tail, 4),
        "pass": cached / prompt >= possible - 0.02 and tail < TAIL_GOAL and part.tokens_per_second > alone.tokens_per_second,
    }
    return live.report(result, as_json=options.as_json)


if __name__ == "__main__":
    sys.exit(main())
