"""What a batch would cost, found out without creating it: every check of a real one, every line counted, nothing written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction

from service.billing.estimates import AnswerLength, Estimate, ModelSizes, price_of
from service.config import Limits
from service.domain.account import File
from service.domain.job import InputError, OnInvalidLine
from service.domain.money import Meter, PriceBook
from service.domain.object_uri import ObjectUri
from service.domain.request_body import GenerationRequest, LineRejected, parse_body
from service.planning.estimate import BYTES_PER_TOKEN
from service.planning.validate import CheckedLine, ErrorList, InputRefused, LineRules, ResolveModel, check_lines, duplicate_error
from service.ports import BlobStore, ChargeFilter, Database, UnitOfWork, UserBuckets
from service.usecases.keys import Caller
from service.usecases.submit import BatchRequest, check_request, input_file
from service.usecases.user_buckets import BucketProblem, explained, find_input, open_bucket

READ_BYTES = 1 << 20
HISTORY = timedelta(days=30)
"""How far back answers of the same model are looked at."""
TURN_TOKENS, TEMPLATE_TOKENS = 3, 8
"""What a chat template adds to a message and to a conversation, roughly, where it is not known."""
UNKNOWN_CONTEXT = 8192
"""Tokens of an answer without a limit, at most."""

CountTokens = Callable[[GenerationRequest], int]
"""Tokens of a line's prompts, as they will be billed. Raises LineRejected where the model would refuse them."""
Tokenizers = Callable[[str], CountTokens | None]
"""A model -> what counts its tokens, or None where its tokenizer is not on this machine."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """The estimate, and what a real batch would be failed for (`errors` empty: it would run). `invalid`: lines that would not be run."""

    estimate: Estimate
    price_version: int
    total: int
    invalid: int
    errors: tuple[InputError, ...] = ()


def estimate_batch(
    request: BatchRequest,
    *,
    caller: Caller,
    database: Database,
    blobs: BlobStore,
    buckets: UserBuckets,
    limits: Limits,
    resolve_model: ResolveModel,
    tokenizers: Tokenizers,
) -> DryRun:
    """Reads the whole input once; memory grows by a few bytes a line (custom_ids that were seen).

    Raises:
        InvalidRequest, NotFound: what a real create would be refused for.
        Unavailable, BlobNotFound: the input cannot be read now.
    """
    check_request(request)
    with database.begin() as uow:
        file = input_file(uow, request, caller) if request.input_file_id is not None else None
        book = uow.ledger.price_book()
    rules = LineRules(request.endpoint, resolve_model, limits.max_lines, limits.max_line_bytes, limits.max_json_depth)
    count = _Count(request.endpoint, tokenizers)
    refused: tuple[InputError, ...] = ()
    try:
        portions = _read(blobs, file) if file else _read_uri(request, caller, database, buckets, limits)
        for line in check_lines(portions, rules):
            count.add(line)
    except (InputRefused, BucketProblem) as problem:
        refused = (problem.error,)
    if not refused and request.on_invalid_line is OnInvalidLine.FAIL:
        refused = count.errors.as_tuple() if count.errors else ()
    with database.begin() as uow:
        answers = _answer_lengths(uow, caller.project_id, list(count.sizes))
    return DryRun(_priced(count, book, answers), book.version, count.total, count.invalid, refused)


def guess_tokens(request: GenerationRequest) -> int:
    """Tokens of a line's prompts by the size of their texts, rounded up, with an allowance for what a chat template adds."""
    tokens = sum(-(-len(text.encode()) // BYTES_PER_TOKEN) for text in request.prompt_texts)
    if request.messages is None:
        return tokens + sum(len(prompt) for prompt in request.prompts if not isinstance(prompt, str))
    return tokens + TEMPLATE_TOKENS + TURN_TOKENS * len(request.messages)


@dataclass(slots=True)
class _Count:
    """What the pass over the input adds up."""

    endpoint: str
    tokenizers: Tokenizers
    sizes: dict[str, ModelSizes] = field(default_factory=dict)
    guessed: set[str] = field(default_factory=set)
    errors: ErrorList = field(default_factory=ErrorList)
    total: int = 0
    invalid: int = 0
    _seen: dict[bytes, int] = field(default_factory=dict)

    def add(self, line: CheckedLine) -> None:
        self.total += 1
        error = line.error or self._duplicate(line)
        if error is not None:
            self.invalid += 1
            self.errors.add(error)
            return
        assert line.body is not None
        assert line.staged.model is not None
        try:
            self._price(line.staged.model, parse_body(self.endpoint, line.body))
        except LineRejected:
            self.invalid += 1  # it is answered with a 400 when it runs, and never billed

    def _price(self, model: str, request: GenerationRequest) -> None:
        counter = self.tokenizers(model)
        if counter is None:
            self.guessed.add(model)
        prompt = (counter or guess_tokens)(request)
        self.sizes.setdefault(model, ModelSizes()).add(prompt, request.max_tokens, request.choices)

    def _duplicate(self, line: CheckedLine) -> InputError | None:
        custom_id, line_no = line.staged.custom_id or "", line.staged.line_no
        first = self._seen.setdefault(hashlib.blake2b(custom_id.encode(), digest_size=12).digest(), line_no)
        return None if first == line_no else duplicate_error(line_no, first, custom_id)


def _read(blobs: BlobStore, file: File) -> Iterator[bytes]:
    with blobs.open(file.storage_key) as stream:
        while portion := stream.read(READ_BYTES):
            yield portion


def _read_uri(request: BatchRequest, caller: Caller, database: Database, buckets: UserBuckets, limits: Limits) -> Iterator[bytes]:
    uri = ObjectUri.of_object(request.input_uri or "", param="input_uri")
    with explained(uri, "input_uri", patient=True):
        bucket = open_bucket(database, buckets, caller.project_id, uri)
        version = find_input(bucket, uri, max_bytes=limits.max_file_bytes)
        with bucket.open(uri.key, etag=version.etag) as stream:
            while portion := stream.read(READ_BYTES):
                yield portion


def _answer_lengths(uow: UnitOfWork, project_id: str, models: list[str]) -> dict[str, Fraction]:
    """Average answer tokens of the project's recent lines, by model; models without any are left out."""
    which = ChargeFilter(uow.now - HISTORY, uow.now, project_ids=[project_id], models=models)
    sums: dict[str, tuple[int, int]] = {}
    for bucket in uow.costs.buckets(which, width=HISTORY, by=["model"]):
        model = bucket.charges.key[0]
        tokens, lines = sums.get(model, (0, 0))
        sums[model] = tokens + bucket.charges.quantities.get(Meter.OUTPUT.value, 0), lines + bucket.charges.lines
    return {model: Fraction(tokens, lines) for model, (tokens, lines) in sums.items() if lines > 0}


def _priced(count: _Count, book: PriceBook, answers: dict[str, Fraction]) -> Estimate:
    prices = tuple(
        price_of(model, sizes, book.rates(model), AnswerLength(answers.get(model), UNKNOWN_CONTEXT))
        for model, sizes in sorted(count.sizes.items())
    )
    assumptions = {
        model: "; ".join(
            (
                f"prompt tokens guessed at {BYTES_PER_TOKEN} bytes each" if model in count.guessed else "prompt tokens counted",
                f"answers as long as those of the last {HISTORY.days} days" if model in answers else "answers half as long as their limit",
                *([f"answers without a limit have at most {UNKNOWN_CONTEXT} tokens"] if sizes.limited_answers < sizes.answers else []),
            )
        )
        for model, sizes in sorted(count.sizes.items())
    }
    return Estimate(prices, assumptions)
