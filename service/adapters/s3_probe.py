"""What a store can do, found out with objects of a few bytes that are removed again."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import urllib3

from service.adapters.s3_errors import VENDOR_ERRORS, vendor_errors
from service.errors import LongdraftError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_DATA = b"0123456789"
_WRONG_MD5 = "AAAAAAAAAAAAAAAAAAAAAA=="


def examine(client: S3Client, bucket: str, prefix: str) -> Mapping[str, str]:
    """Feature -> `yes` or `no`. A store that does not know a feature may answer it with anything, so no answer is an outage here."""
    features: Mapping[str, Callable[[S3Client, str, str], bool]] = {
        "conditional put": _conditional_put,
        "multipart": _multipart,
        "range": _range,
        "presigned urls": _presigned,
        "checks md5": _checks_md5,
    }
    found = {}
    for feature, has in features.items():
        name = f"{prefix}probe/{uuid.uuid4().hex}"
        try:
            with vendor_errors(f"probing {bucket}"):
                found[feature] = "yes" if has(client, bucket, name) else "no"
        except LongdraftError:
            found[feature] = "no"
        finally:
            with contextlib.suppress(*VENDOR_ERRORS):
                client.delete_object(Bucket=bucket, Key=name)
    return found


def _conditional_put(client: S3Client, bucket: str, name: str) -> bool:
    """The second put of the same name must be refused."""
    client.put_object(Bucket=bucket, Key=name, Body=_DATA, IfNoneMatch="*")
    try:
        with vendor_errors(""):
            client.put_object(Bucket=bucket, Key=name, Body=_DATA, IfNoneMatch="*")
    except LongdraftError:
        return True
    return False


def _multipart(client: S3Client, bucket: str, name: str) -> bool:
    upload = client.create_multipart_upload(Bucket=bucket, Key=name)["UploadId"]
    part = client.upload_part(Bucket=bucket, Key=name, UploadId=upload, PartNumber=1, Body=_DATA)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    client.complete_multipart_upload(Bucket=bucket, Key=name, UploadId=upload, MultipartUpload=parts)  # type: ignore[arg-type]  # dict literal
    return client.head_object(Bucket=bucket, Key=name)["ContentLength"] == len(_DATA)


def _range(client: S3Client, bucket: str, name: str) -> bool:
    client.put_object(Bucket=bucket, Key=name, Body=_DATA)
    return client.get_object(Bucket=bucket, Key=name, Range="bytes=2-4")["Body"].read() == _DATA[2:5]


def _presigned(client: S3Client, bucket: str, name: str) -> bool:
    where = {"Bucket": bucket, "Key": name}
    put, get = (client.generate_presigned_url(operation, Params=where, ExpiresIn=60) for operation in ("put_object", "get_object"))
    with urllib3.PoolManager(retries=False, timeout=5.0) as plain:
        return plain.request("PUT", put, body=_DATA).status == 200 and plain.request("GET", get).data == _DATA


def _checks_md5(client: S3Client, bucket: str, name: str) -> bool:
    """Bytes that are not those of the Content-MD5 must be refused."""
    try:
        with vendor_errors(""):
            client.put_object(Bucket=bucket, Key=name, Body=_DATA, ContentMD5=_WRONG_MD5)
    except LongdraftError:
        return True
    return False
