"""Several answers to one prompt share its KV cache: `python -m tests.benchmarks.n_answers [--n 8] [--prompt-tokens 1500] [--json]`.

The cache held at its fullest by one answer, by `n` answers to one line, and by `n` lines of their own. Goal: what the other answers add to
the first is no more than their own tokens, in whole blocks.
"""

from __future__ import annotations

import sys
from random import Random

from engine.config import EngineConfig
from engine.types import Request, SamplingParams
from tests.benchmarks import live

BLOCK = EngineConfig().block_size


def main() -> int:
    parser = live.arguments(__doc__)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    options = parser.parse_args()
    loaded = live.load(options)
    rng = Random(0)
    size = loaded.model.spec.vocab_size

    def line(id: str) -> tuple[str, tuple[int, ...]]:
        return id, tuple(rng.randrange(size) for _ in range(options.prompt_tokens))

    def asked(lines: list[tuple[str, tuple[int, ...]]], samples: int) -> list[Request]:
        params = [SamplingParams(max_tokens=options.answer, seed=1, sample=sample, ignore_eos=True) for sample in range(samples)]
        return [Request(id, prompt, params[sample], choice=sample) for id, prompt in lines for sample in range(samples)]

    first = line("0")
    cases = {
        "one answer": asked([first], 1),
        f"{options.n} answers": asked([first], options.n),
        f"{options.n} lines": asked([first, *(line(str(number)) for number in range(1, options.n))], 1),
    }
    config = EngineConfig(max_sequences=options.n, drafter="off")
    runs = {label: live.run(loaded, config, requests, label) for label, requests in cases.items()}
    one, several, apart = runs.values()
    block_bytes = one.block_bytes
    own = -(-(options.answer + BLOCK) // BLOCK) * block_bytes
    most = one.kv_peak_bytes + (options.n - 1) * own
    result = {
        "benchmark": "answers to one prompt",
        "n": options.n,
        "prompt_tokens": options.prompt_tokens,
        "answer_tokens": options.answer,
        "kv_peak_bytes": {label: run.kv_peak_bytes for label, run in runs.items()},
        "against_lines_of_their_own": round(several.kv_peak_bytes / apart.kv_peak_bytes, 3),
        "prefilled_tokens": {label: sum(result.ledger.prefilled for result in run.results) for label, run in runs.items()},
        "distinct_answers": len({result.token_ids for result in several.results}),
        "most_bytes": most,
        "pass": several.kv_peak_bytes <= most,
    }
    return live.report(result, as_json=options.as_json)


if __name__ == "__main__":
    sys.exit(main())
