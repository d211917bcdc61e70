"""A job whose answers have a form: `python -m tests.benchmarks.json_schema [--lines 200] [--repeats 2] [--json]`.

Lines of six schemas (nested objects, enums, arrays, patterns, alternatives, bounded numbers), greedy, with drafts and without, and the same
prompts without a form, each answer as long as the formed one; interleaved, a fresh engine a run. Goals: every answer is valid under its
schema, the texts of all runs are equal, drafts were accepted, and drafting is no slower than 0.98 of plain decoding.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jsonschema

from engine.config import EngineConfig
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, Grammar, GrammarKind, Request, SamplingParams
from tests.benchmarks import live

GOAL = 0.98
NAME = {"type": "string", "minLength": 1, "maxLength": 16}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: Mapping[str, dict[str, Any]] = {
    "nested": _object(
        customer=_object(name=NAME, address=_object(street=NAME, city=NAME, zip={"type": "string", "pattern": "^[0-9]{5}$"})),
        paid={"type": "boolean"},
    ),
    "enums": _object(
        sentiment={"enum": ["positive", "neutral", "negative"]},
        topic={"enum": ["delivery", "price", "quality", "other"]},
        urgent={"type": "boolean"},
    ),
    "arrays": _object(
        title=NAME,
        tags={"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 10}, "minItems": 2, "maxItems": 4},
        scores={"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 10}, "minItems": 3, "maxItems": 3},
    ),
    "patterns": _object(
        order={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        day={"type": "string", "format": "date"},
        host={"type": "string", "format": "ipv4"},
    ),
    "alternatives": _object(
        payment={
            "anyOf": [
                _object(kind={"const": "card"}, last_digits={"type": "string", "pattern": "^[0-9]{4}$"}),
                _object(kind={"const": "transfer"}, bank=NAME),
                {"type": "null"},
            ]
        },
        currency={"enum": ["EUR", "USD", "CHF"]},
    ),
    "numbers": _object(
        weight={"type": "number", "minimum": 0, "maximum": 500},
        pieces={"type": "integer", "multipleOf": 5, "minimum": 5, "maximum": 100},
        ratio={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    ),
}
_GOODS = ("a red bicycle", "two wool blankets", "an oak table", "a box of pears", "a garden lamp", "three paper maps", "a tin of tea")
_TOWNS = ("Bern", "Lyon", "Porto", "Gdansk", "Turin", "Aarhus", "Ghent", "Graz", "Split", "Bergen", "Cork")


def prompt(number: int, name: str) -> list[dict[str, str]]:
    goods, town = _GOODS[number % len(_GOODS)], _TOWNS[number % len(_TOWNS)]
    text = f"Order {1000 + 7 * number}: a customer in {town} bought {goods} and writes that it came after {number % 9 + 1} days."
    asked = ", ".join(SCHEMAS[name]["properties"])
    return [{"role": "user", "content": f"{text}\nExtract as JSON: {asked}."}]


def main() -> int:
    parser = live.arguments(__doc__)
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--max-sequences", type=int, default=None)
    parser.add_argument("--show", type=int, default=0, help="print so many answers to stderr")
    options = parser.parse_args()
    loaded = live.load(options)
    tokenizer = Tokenizer(loaded.tokenizer)
    names = [list(SCHEMAS)[number % len(SCHEMAS)] for number in range(options.lines)]
    forms = {name: Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)) for name, schema in SCHEMAS.items()}
    formed = [
        Request(
            str(number),
            tokenizer.encode_chat(prompt(number, name)),
            SamplingParams(max_tokens=options.max_tokens, temperature=0.0, grammar=forms[name]),
            template=name,
        )
        for number, name in enumerate(names)
    ]
    runs: dict[str, list[live.Run]] = {"plain": [], "drafts": [], "free plain": [], "free drafts": []}
    free: list[Request] = []
    live.run(loaded, EngineConfig(max_sequences=options.max_sequences), formed[: len(SCHEMAS)], "warming up")
    for _ in range(options.repeats):
        for label, done in runs.items():
            asked = free if label.startswith("free") else formed
            config = EngineConfig(drafter="off" if label.endswith("plain") else "auto", max_sequences=options.max_sequences)
            done.append(live.run(loaded, config, asked, label))
            if not free:
                free = [_free(formed[int(result.id)], len(result.token_ids)) for result in done[0].results]
    answers = {result.id: result for result in runs["drafts"][0].results}
    if options.show:
        for number in range(min(options.show, options.lines)):
            print(f"{names[number]}: {answers[str(number)].text}", file=sys.stderr)
    valid = [
        valid_under(SCHEMAS[names[int(id)]], result.text) for id, result in answers.items() if result.finish_reason is FinishReason.STOP
    ]
    ratios = [fast.tokens_per_second / slow.tokens_per_second for fast, slow in zip(runs["drafts"], runs["plain"], strict=True)]
    equal = all(run.answers() == runs["plain"][0].answers() for label in ("plain", "drafts") for run in runs[label])
    accepted = sum(result.ledger.accepted for result in answers.values())
    result = {
        "benchmark": "answers of a given form",
        "lines": options.lines,
        "schemas": list(SCHEMAS),
        "valid": [sum(valid), options.lines],
        "cut_off": sum(result.finish_reason is FinishReason.LENGTH for result in answers.values()),
        "texts_equal": equal,
        "accepted_drafts": accepted,
        "verified_drafts": sum(result.ledger.verified for result in answers.values()),
        "generated_tokens": sum(len(result.token_ids) for result in answers.values()),
        "steps_per_token": {label: round(_steps(done[0]), 3) for label, done in runs.items()},
        "tokens_per_second": {label: [round(run.tokens_per_second, 1) for run in done] for label, done in runs.items()},
        "drafts_against_plain": round(statistics.median(ratios), 3),
        "form_against_free": {kind: round(statistics.median(_ratios(runs[kind], runs[f"free {kind}"])), 3) for kind in ("plain", "drafts")},
        "goal": GOAL,
        "pass": sum(valid) == options.lines and equal and accepted > 0 and statistics.median(ratios) >= GOAL,
    }
    return live.report(result, as_json=options.as_json)


def valid_under(schema: Mapping[str, Any], text: str) -> bool:
    """Formats included."""
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    try:
        return bool(validator.is_valid(json.loads(text)))
    except ValueError:
        return False


def _free(request: Request, length: int) -> Request:
    return replace(request, sampling=SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True))


def _ratios(some: Sequence[live.Run], others: Sequence[live.Run]) -> list[float]:
    return [one.tokens_per_second / other.tokens_per_second for one, other in zip(some, others, strict=True)]


def _steps(run: live.Run) -> float:
    return sum(result.ledger.steps for result in run.results) / run.generated


if __name__ == "__main__":
    sys.exit(main())
