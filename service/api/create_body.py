"""The body of `POST /v1/batches`: types and sizes. What the values mean is checked by usecases.submit."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WithJsonSchema

from service.api.errors import invalid_fields
from service.billing.price_book import parse_amount
from service.domain.job import OnInvalidLine
from service.errors import InvalidRequest
from service.usecases.submit import BatchRequest

NOT_YET = ("webhook", "deadline")
"""Asking for one of these is refused by name: to ignore them would be worse than not to offer them."""

Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]


class OutputExpiresAfter(BaseModel):
    """When the output and error files expire."""

    model_config = ConfigDict(extra="forbid", strict=True)
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class CreateBatchBody(BaseModel):
    """What a batch is made of; `input_uri` and those from `priority` on are Longdraft's own (with the SDK: `extra_body`)."""

    model_config = ConfigDict(extra="forbid", strict=True)
    input_file_id: str | None = Field(None, description="A file uploaded with the purpose 'batch'; or `input_uri`.")
    endpoint: str = Field(description="'/v1/chat/completions' or '/v1/completions': what every line's `url` must say.")
    completion_window: str = Field(description="How long the batch may take: '24h', or any of 1m ... 30d.")
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    output_expires_after: OutputExpiresAfter | None = None
    priority: Annotated[int, Field(ge=0, le=9)] = Field(0, description="Higher runs first.")
    on_invalid_line: Literal["fail", "skip"] = Field("fail", description="'skip' sends bad lines to the error file and runs the rest.")
    drafter: str = Field("auto", description="'auto', 'off', or the name of a drafter.")
    input_uri: str | None = Field(None, description="'s3://bucket/key' instead of `input_file_id`: an object in the project's bucket.")
    output_uri: str | None = Field(
        None, description="'s3://bucket/folder/': gets output.jsonl, errors.jsonl, cost.json and, last, manifest.json."
    )
    max_cost: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]})] = Field(
        None, description="Dollars ('2.50') that the batch may cost at most; lines beyond go to the error file and are not billed."
    )
    dry_run: bool = Field(False, description="Checks and counts everything, answers with an estimate of the price, creates nothing.")


def parse_create(body: dict[str, Any]) -> BatchRequest:
    """The request in a body.

    Raises:
        InvalidRequest: names the first parameter that is missing, unknown, not available yet, or of a wrong type or size.
    """
    for name in NOT_YET:
        value = body.get(name)
        if value is not None and value is not False:
            raise InvalidRequest(f"'{name}' is not available on this server yet: leave it out.", param=name, code="unsupported_parameter")
    known = {name: value for name, value in body.items() if name not in NOT_YET}
    try:
        parsed = CreateBatchBody.model_validate(known)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_url=False)) from None
    if parsed.input_file_id is None and parsed.input_uri is None:
        message = "Missing required parameter: 'input_file_id' (or 'input_uri', an object in your bucket)."
        raise InvalidRequest(message, param="input_file_id", code="missing_required_parameter")
    if parsed.input_file_id is not None and parsed.input_uri is not None:
        raise InvalidRequest("Give 'input_file_id' or 'input_uri', not both.", param="input_uri", code="invalid_value")
    return BatchRequest(
        input_file_id=parsed.input_file_id,
        endpoint=parsed.endpoint,
        completion_window=parsed.completion_window,
        metadata=parsed.metadata or {},
        output_expires_after=parsed.output_expires_after.seconds if parsed.output_expires_after else None,
        priority=parsed.priority,
        on_invalid_line=OnInvalidLine(parsed.on_invalid_line),
        drafter=parsed.drafter,
        input_uri=parsed.input_uri,
        output_uri=parsed.output_uri,
        max_cost=_max_cost(parsed.max_cost),
    )


def _max_cost(value: Any) -> int | None:
    """Femto-dollars. A JSON number counts as the decimal digits that it is written with. Raises InvalidRequest."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        message = "Invalid 'max_cost': an amount is a decimal number of dollars, such as '2.50'."
        raise InvalidRequest(message, param="max_cost", code="invalid_type")
    try:
        amount = parse_amount(value if isinstance(value, str) else f"{Decimal(repr(value)):f}")
    except InvalidRequest as error:
        raise InvalidRequest(f"Invalid 'max_cost': {error.message}", param="max_cost", code="invalid_value") from None
    if amount == 0:
        message = "Invalid 'max_cost': a batch that may cost nothing cannot run; leave it out for no limit."
        raise InvalidRequest(message, param="max_cost", code="invalid_value")
    return amount
