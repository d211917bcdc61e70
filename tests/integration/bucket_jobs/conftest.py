"""A job from bucket to bucket; between it and the store stands a proxy that can do what networks do."""

import boto3
import pytest

from service.adapters.buckets_s3 import S3Buckets
from service.adapters.memory import MemoryBlobStore
from service.adapters.vault import Vault
from tests.contract.fault_proxy import FaultProxy
from tests.integration.bucket_jobs.bucketed import Bucketed
from tests.integration.jobs import settings_for


@pytest.fixture
def proxy(s3_url):
    with FaultProxy(s3_url) as running:
        yield running


@pytest.fixture
def jobs(database, tmp_path, s3_settings, s3_bucket, proxy):
    """Users' buckets are reached through the proxy."""
    settings = s3_settings.model_copy(update={"endpoint_url": proxy.url})
    buckets = S3Buckets(settings, Vault("key", tmp_path / "none"), own=("own", "prefix"))
    made = Bucketed(database, MemoryBlobStore(), settings=settings_for(tmp_path), buckets=buckets)
    made.client = boto3.client(
        "s3", endpoint_url=s3_settings.endpoint_url, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    made.bucket = s3_bucket
    return made
