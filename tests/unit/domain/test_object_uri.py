"""Addresses of objects and folders in users' buckets."""

import pytest

from service.domain.object_uri import ObjectUri
from service.errors import InvalidRequest


def test_an_object() -> None:
    uri = ObjectUri.of_object("s3://my-bucket.eu/a b/ü.jsonl", param="input_uri")
    assert (uri.bucket, uri.key, uri.name, str(uri)) == ("my-bucket.eu", "a b/ü.jsonl", "ü.jsonl", "s3://my-bucket.eu/a b/ü.jsonl")


@pytest.mark.parametrize(
    ("text", "shown", "child"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b", "a/b/x"),
        ("s3://bucket/a/b/", "s3://bucket/a/b", "a/b/x"),
        ("s3://bucket/", "s3://bucket/", "x"),
        ("s3://bucket", "s3://bucket/", "x"),
    ],
)
def test_a_folder(text: str, shown: str, child: str) -> None:
    folder = ObjectUri.of_folder(text, param="output_uri")
    assert (str(folder), folder.child("x").key) == (shown, child)
    assert ObjectUri.of_folder(str(folder), param="output_uri") == folder


NOWHERE = ["", "bucket/key", "http://bucket/key", "s3:/bucket/key", "s3:///key", "s3://b/key", "s3://-bucket/key", "s3://user@host/key"]
NOWHERE += ["s3://127.0.0.1/key", "s3://a..b/key", "s3://bucket:80/key", "s3://arn:aws:s3:::x/key", "S3://bucket/key"]


@pytest.mark.parametrize(
    "text", [*NOWHERE, "s3://bucket", "s3://bucket/", "s3://bucket/a/", "s3://bucket/a//b", "s3://bucket/../x", "s3://bucket/a\nb"]
)
def test_what_is_no_object(text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        ObjectUri.of_object(text, param="input_uri")
    assert refusal.value.param == "input_uri"
    assert "s3://bucket/key" in refusal.value.message


@pytest.mark.parametrize(
    "text", [*NOWHERE, "s3://bucket/a//b", "s3://bucket/out.jsonl", "s3://bucket/out.json", f"s3://bucket/{'x/' * 490}y"]
)
def test_what_is_no_folder(text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        ObjectUri.of_folder(text, param="output_uri")
    assert refusal.value.param == "output_uri"
