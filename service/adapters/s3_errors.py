"""boto3's errors as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import urllib3
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from service.errors import BlobCorrupt, BlobDenied, BlobNotFound, BucketMissing, Conflict, LongdraftError, Unavailable

VENDOR_ERRORS = (ClientError, BotoCoreError, urllib3.exceptions.HTTPError, OSError)

_MISSING = frozenset({"NoSuchKey", "NoSuchUpload", "NotFound", "404"})
_REFUSED = frozenset(
    {"AccessDenied", "AllAccessDisabled", "ExpiredToken", "Forbidden", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
)


_UNKNOWN = frozenset({"NotImplemented", "MethodNotAllowed", "XNotImplemented"})


class NotOffered(Unavailable):
    """This store does not know what was asked of it."""


class BeyondTheEnd(LongdraftError):
    """416: the range begins at or after the object's last byte."""


@contextlib.contextmanager
def vendor_errors(doing: str) -> Iterator[None]:
    """boto3's errors as ours, with the operation and the store's own words."""
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise BlobDenied(f"The object store needs credentials ({doing}): set s3.access_key_id and s3.secret_access_key. {error}") from error
    except ClientError as error:
        raise _translated(error, doing) from error
    except (BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
        raise Unavailable(f"The object store does not answer ({doing}): {error}") from error


def _translated(error: ClientError, doing: str) -> LongdraftError:
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = f"{doing}: {code} {error.response.get('Error', {}).get('Message', '')}".strip()
    if code == "NoSuchBucket":
        return BucketMissing(f"The bucket does not exist ({said}): create it, or correct its name.")
    if code in _MISSING:
        return BlobNotFound(f"Not in the object store ({said}).")
    if code in _REFUSED or status in (401, 403):
        return BlobDenied(f"The object store refuses these credentials ({said}): check the key, its policy and the bucket.")
    if code in _UNKNOWN or status in (405, 501):
        return NotOffered(f"The object store cannot do this ({said}).")
    if code == "InvalidRange" or status == 416:
        return BeyondTheEnd(said)
    if code in ("PreconditionFailed", "ConditionalRequestConflict") or status == 412:
        return Conflict(f"The object store's condition failed ({said}).")
    if code in ("BadDigest", "InvalidDigest"):
        return BlobCorrupt(f"The bytes were damaged on the way to the object store ({said}).")
    return Unavailable(f"The object store failed ({said}).")
