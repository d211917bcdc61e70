"""A small model drafts for one with another tokenizer: `python -m tests.benchmarks.cross_tokenizer [JOB.jsonl ...] [--model gemma3-270m]
[--drafter smollm2-135m] [--lines 64]`.

Every line greedily, without drafts and with `--drafts` a step, whatever they cost. Answers must be equal token by token; where two differ,
the target's two best tokens at that place must be a tie (a gap of log-probabilities below 1e-4). Prints the acceptance length (bonus token
included) with its 95% interval.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoints import LoadedModel
from engine.config import EngineConfig
from engine.training.evaluate import Measured, no_blocks
from engine.types import Request
from tests.benchmarks import live

TIE = 1e-4
FEWEST = 60


def main() -> int:
    parser = live.arguments(__doc__)
    parser.set_defaults(model="gemma3-270m")
    parser.add_argument("jobs", nargs="*", type=Path, default=live.EXAMPLES, help="OpenAI batch files (default: the examples)")
    parser.add_argument("--drafter", default="smollm2-135m")
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--sequences", type=int, default=8)
    options = parser.parse_args()
    loaded = live.load(options)
    requests = live.read_requests(options.jobs, loaded, max_tokens=options.max_tokens)[: options.lines]
    with live.Steps(2) as steps:
        with steps.one("without drafts") as tick:
            plain = live.run(loaded, config(options, drafter="off"), requests, tick=tick)
        with steps.one(f"{options.drafter} drafts") as tick:
            fields = {"drafter": options.drafter, "fixed_drafts": options.drafts, "max_draft_tokens": options.drafts}
            drafted = live.run(loaded, config(options, **fields), requests, tick=tick)
    gaps = differences(loaded, options, requests, plain, drafted)
    ledgers = [result.ledger for result in drafted.results]
    # The first token comes of the prompt's own step.
    tokens, walked = (np.array([getattr(ledger, name) for ledger in ledgers], np.float64) - 1.0 for name in ("sampled", "steps"))
    got = Measured({"all": tokens}, {"all": walked}, *no_blocks(0))
    accepted, verified = (sum(getattr(ledger, name) for ledger in ledgers) for name in ("accepted", "verified"))
    return live.report(
        {
            "benchmark": "cross tokenizer",
            "target": loaded.model.spec.name,
            "drafter": options.drafter,
            "lines": len(requests),
            "drafts": options.drafts,
            "answers_equal": [len(requests) - len(gaps), len(requests)],
            "gaps_where_they_differ": [round(gap, 7) for gap in gaps],
            "acceptance_length": round(got.acceptance["all"], 4),
            "interval": [round(end, 4) for end in got.intervals()["all"]],
            "accepted_drafts": [accepted, verified],
            "pass": all(gap < TIE for gap in gaps) and len(requests) >= min(FEWEST, options.lines) and accepted > 0,
        },
        as_json=options.as_json,
    )


def config(options: Any, **fields: Any) -> EngineConfig:
    return EngineConfig(max_sequences=options.sequences, seed=0, **fields)


def differences(loaded: LoadedModel, options: Any, requests: list[Request], plain: live.Run, drafted: live.Run) -> list[float]:
    """For each request whose answers differ, how far the target's two best tokens are apart where they part."""
    one, other = plain.answers(), drafted.answers()
    asked = []
    for request in requests:
        pairs = zip(one[request.id], other[request.id], strict=False)
        if one[request.id] != other[request.id]:
            place = next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(one[request.id]), len(other[request.id])))
            prompt = (*request.prompt_token_ids, *one[request.id][:place])
            asked.append(Request(request.id, prompt, replace(request.sampling, max_tokens=1, logprobs=2)))
    if not asked:
        return []
    found = live.run(loaded, config(options, drafter="off"), asked)
    return [result.logprobs[0].top[0][1] - result.logprobs[0].top[1][1] for result in found.results]


if __name__ == "__main__":
    sys.exit(main())
