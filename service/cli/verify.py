"""`longdraft verify`: delivered answers beside the same lines run again without speculation, and how near a tie they differ."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import orjson

from service.cli.output import Failure
from service.domain.line import LineOutcome, LineWork
from service.domain.request_body import CHAT, GenerationRequest, parse_body
from service.ports import InferenceRunner

TIE = 1e-4
"""Log-probabilities nearer than this are a tie: float32 adds up in another order when other lines share a step."""
_TOP = {CHAT: {"logprobs": True, "top_logprobs": 20}}
_TOP_TEXT = {"logprobs": 5}


@dataclass(frozen=True, slots=True)
class Delivered:
    """A line of an output file, with the body that was asked for."""

    custom_id: str
    endpoint: str
    asked: Mapping[str, Any]
    answer: Mapping[str, Any]

    @property
    def repeatable(self) -> bool:
        """Whether the text is a function of the request: greedy, or drawn with a seed."""
        request = self.request
        return request.temperature == 0.0 or request.seed is not None

    @property
    def request(self) -> GenerationRequest:
        return parse_body(self.endpoint, self.asked)


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where a choice differs. `gap`: by how much the plain answer's token is likelier than the one delivered (natural log,
    before temperature); None where that is not among the likeliest. `tie`: it is as good as nothing.
    """

    custom_id: str
    choice: int
    at: int
    delivered: str
    plain: str
    gap: float | None

    @property
    def tie(self) -> bool:
        return self.gap is not None and abs(self.gap) < TIE

    def as_json(self) -> dict[str, Any]:
        return {
            "custom_id": self.custom_id,
            "choice": self.choice,
            "at_character": self.at,
            "delivered": self.delivered,
            "plain": self.plain,
            "logit_gap": self.gap,
            "tie": self.tie,
        }


@dataclass(slots=True)
class Report:
    """`made`: what made the answers, each pair once: (delivered, here). `unrepeatable`: sampled without a seed, so not to be compared."""

    compared: int = 0
    equal: int = 0
    unrepeatable: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(custom_id, why it could not be run again)."""
    differences: list[Difference] = field(default_factory=list)
    made: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failed and all(difference.tie for difference in self.differences)

    def as_json(self) -> dict[str, Any]:
        return {
            "compared": self.compared,
            "equal": self.equal,
            "unrepeatable": self.unrepeatable,
            "failed": [{"custom_id": name, "reason": reason} for name, reason in self.failed],
            "differences": [difference.as_json() for difference in self.differences],
            "made": [{"delivered": delivered, "here": here} for delivered, here in self.made],
            "pass": self.passed,
        }


def sample(output: Iterable[bytes], count: int, seed: str) -> dict[str, dict[str, Any]]:
    """`count` lines of an output file (fewer if it has fewer), each equally likely: custom_id -> the answer's body. One pass."""
    rng = random.Random(seed)
    kept: list[bytes] = []
    for number, line in enumerate(output):
        if number < count:
            kept.append(line)
        elif (place := rng.randrange(number + 1)) < count:
            kept[place] = line
    rows = [orjson.loads(line) for line in kept]
    return {row["custom_id"]: row["response"]["body"] for row in rows}


def with_requests(answers: Mapping[str, dict[str, Any]], job: Iterable[bytes]) -> list[Delivered]:
    """The sampled answers with what was asked, from the input file. Raises Failure where a line of it is gone."""
    found = {}
    for line in job:
        text = line.removeprefix(b"\xef\xbb\xbf").strip()
        row = orjson.loads(text) if text else {}
        if row.get("custom_id") in answers:
            found[row["custom_id"]] = Delivered(row["custom_id"], row["url"], row["body"], answers[row["custom_id"]])
    if missing := answers.keys() - found.keys():
        raise Failure(f"The input file does not have the lines {', '.join(sorted(missing)[:5])}, which the output file answers.")
    return [found[name] for name in answers]


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines out of portions of a file."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def compare(lines: Sequence[Delivered], runner: InferenceRunner) -> Report:
    """Runs the lines again, without drafts, model by model. Raises ModelUnavailable where a model is not here."""
    report = Report()
    for model, members in groupby(sorted(lines, key=lambda line: line.answer["model"]), key=lambda line: line.answer["model"]):
        chosen = []
        for line in members:
            chosen += [line] if line.repeatable else []
            report.unrepeatable += not line.repeatable
        if chosen:
            runner.load(model)
            _compare(model, chosen, runner, report)
    return report


def _compare(model: str, lines: list[Delivered], runner: InferenceRunner, report: Report) -> None:
    again = _run(model, lines, [dict(line.asked) for line in lines], runner)
    differing = []
    for number, line in enumerate(lines):
        outcome = again.get(number)
        if outcome is None or outcome.status_code != 200 or outcome.body is None:
            report.failed.append((line.custom_id, _why(outcome)))
            continue
        report.compared += 1
        pair = line.answer.get("longdraft", {}), outcome.body.get("longdraft", {})
        report.made += [] if pair in report.made else [pair]
        places = [place for place, pair in enumerate(_texts(line.answer, outcome.body)) if pair[0] != pair[1]]
        report.equal += not places
        differing += [(line, place) for place in places]
    # Only now with log-probabilities: most lines are equal, and scores are long.
    scored_lines = [line for line, _ in differing]
    bodies = [{**line.asked, **_TOP.get(line.endpoint, _TOP_TEXT)} for line in scored_lines]
    scored = _run(model, scored_lines, bodies, runner) if bodies else {}
    for number, (line, place) in enumerate(differing):
        outcome = scored.get(number)
        body = outcome.body if outcome is not None and outcome.status_code == 200 else None
        report.differences.append(_difference(line, place, body))


def _run(model: str, lines: Sequence[Delivered], bodies: Sequence[dict[str, Any]], runner: InferenceRunner) -> dict[int, LineOutcome]:
    works = [
        LineWork("verify", number, 0, line.custom_id, model, line.endpoint, body, drafter="off")
        for number, (line, body) in enumerate(zip(lines, bodies, strict=True))
    ]
    return {outcome.line_no: outcome for outcome in runner.run(works)}


def _why(outcome: LineOutcome | None) -> str:
    if outcome is None:
        return "it gave no result"
    error = (outcome.body or {}).get("error", {})
    return str(error.get("message") or outcome.error_message or "it gave no answer")


def _texts(delivered: Mapping[str, Any], plain: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = zip(delivered["choices"], plain["choices"], strict=True)
    return [(_text(one), _text(other)) for one, other in pairs]


def _text(choice: Mapping[str, Any]) -> str:
    """All that was said: thoughts, content, calls."""
    message = choice.get("message")
    if message is None:
        return str(choice["text"])
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls") or ()]
    said = message.get("reasoning_content"), message.get("content"), calls
    return said[1] or "" if not said[0] and not calls else orjson.dumps(said).decode()


def _difference(line: Delivered, place: int, scored: Mapping[str, Any] | None) -> Difference:
    delivered = _text(line.answer["choices"][place])
    if scored is None:
        return Difference(line.custom_id, place, 0, delivered[:40], "", None)
    choice = scored["choices"][place]
    plain = _text(choice)
    at = next((n for n, (a, b) in enumerate(zip(delivered, plain, strict=False)) if a != b), min(len(delivered), len(plain)))
    return Difference(line.custom_id, place, at, delivered[at : at + 40], plain[at : at + 40], _gap(choice, delivered))


def _gap(choice: Mapping[str, Any], delivered: str) -> float | None:
    """At the first token of the plain answer that the delivered one does not go on with: its log-probability less that of the
    longest of the likeliest tokens that the delivered one does go on with."""
    text = ""
    for token, logprob, others in _scores(choice):
        if delivered.startswith(text + token):
            text += token
            continue
        fitting = [(name, value) for name, value in others if name and delivered.startswith(text + name)]
        return logprob - max(fitting, key=lambda pair: len(pair[0]))[1] if fitting else None
    return None


def _scores(choice: Mapping[str, Any]) -> Iterator[tuple[str, float, list[tuple[str, float]]]]:
    """(token, log-probability, the likeliest in its place) of each token of the answer."""
    found = choice["logprobs"]
    if "content" in found:
        for entry in found["content"]:
            yield entry["token"], entry["logprob"], [(other["token"], other["logprob"]) for other in entry["top_logprobs"]]
        return
    for token, logprob, others in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        if logprob is not None:
            yield token, logprob, list((others or {}).items())
