"""From bucket to bucket as users do it: the command line, the stock SDK, and plain HTTP, on running parts."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import httpx
import pytest

from service.adapters.standin import StandinRunner
from service.bootstrap import open_services
from service.config import load_settings
from service.control import run_control
from service.errors import Unavailable
from service.usecases.heartbeat import WorkerIdentity
from service.usecases.run_groups import GroupRunner
from tests.integration.api_server import serve
from tests.integration.jobs import SHORT, lines

RECOMPUTE = Path(__file__).parents[2] / "infra" / "examples" / "recompute_bill.py"
CHAT = "/v1/chat/completions"


class Running:
    """A deployment whose own objects and whose users' objects lie in buckets."""

    def __init__(self, services, environment, client, bucket):
        self.services, self.environment, self.client, self.bucket = services, environment, client, bucket

    def cli(self, *arguments, stdin="", status=0):
        command = [sys.executable, "-m", "service.cli.main", *arguments]
        done = subprocess.run(command, env=os.environ | self.environment, input=stdin, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def get(self, key):
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()


@pytest.fixture
def running(database_url, owner_url, broker_url, s3_settings, s3_bucket, tmp_path):
    own = f"{s3_bucket}-own"
    client = boto3.client(
        "s3", endpoint_url=s3_settings.endpoint_url, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    client.create_bucket(Bucket=own)
    environment = {
        "LONGDRAFT_DATA_DIR": str(tmp_path),
        "LONGDRAFT_DATABASE_URL": database_url,
        "LONGDRAFT_MIGRATION_DATABASE_URL": owner_url,
        "LONGDRAFT_BROKER_URL": broker_url,
        "LONGDRAFT_BLOB_URL": f"s3://{own}/prefix",
        "LONGDRAFT_RUNNER": "standin",
        **{f"LONGDRAFT_TIMING__{name.upper()}": str(value) for name, value in SHORT.items()},
        **{
            f"LONGDRAFT_S3__{name.upper()}": str(value)
            for name, value in s3_settings.model_dump(exclude_none=True).items()
            if name not in ("role_buckets", "allow_private_endpoints")
        },
        "LONGDRAFT_S3__ALLOW_PRIVATE_ENDPOINTS": "true",
    }
    stop = threading.Event()
    with (
        open_services(load_settings(environment)) as services,
        serve(services) as server,
        server.tenant() as tenant,
        contextlib.ExitStack() as stack,
    ):
        environment |= {"LONGDRAFT_URL": tenant.url, "LONGDRAFT_API_KEY": tenant.secret}
        made = Running(services, environment, client, s3_bucket)
        made.tenant = tenant
        for target in (lambda: run_control(services, stop), lambda: _work(services, stop)):
            thread = threading.Thread(target=target)
            thread.start()
            stack.callback(thread.join)
        stack.callback(stop.set)
        yield made


def _work(services, stop):
    settings = services.settings
    identity = WorkerIdentity("worker", "host", 1)
    runner = GroupRunner(
        identity,
        database=services.database,
        blobs=services.blobs,
        runner=StandinRunner(settings),
        timing=settings.timing,
        group_lines=settings.group_lines,
        stop=stop,
        hint=threading.Event(),
    )
    with runner:
        while not stop.is_set():
            with contextlib.suppress(Unavailable):  # as `service.worker` does: a machine that stood still has lost its connections
                runner.drain()
            time.sleep(0.05)


def checked(running, folder, tmp_path, lines_in_output):
    """Manifest, hashes, and the bill, from the downloaded objects alone."""
    manifest = json.loads(running.get(f"{folder}/manifest.json"))
    for described in filter(None, manifest["objects"].values()):
        data = running.get(described["uri"].removeprefix(f"s3://{running.bucket}/"))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (described["bytes"], described["sha256"])
        (tmp_path / described["uri"].rpartition("/")[2]).write_bytes(data)
    assert manifest["objects"]["output"]["lines"] == lines_in_output
    command = [sys.executable, "-I", RECOMPUTE, tmp_path / "output.jsonl", tmp_path / "cost.json"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    return manifest


def test_by_the_command_line(running, tmp_path):
    running.client.put_object(Bucket=running.bucket, Key="in/job.jsonl", Body=lines(40))
    source, folder = f"s3://{running.bucket}/in/job.jsonl", f"s3://{running.bucket}/cli/"
    estimate = json.loads(running.cli("submit", source, "--estimate", "--json").stdout)
    assert (estimate["lines"], estimate["errors"]["data"]) == (40, [])
    answers = tmp_path / "answers.jsonl"
    done = running.cli("submit", source, "--output-uri", folder, "--wait", "-o", answers, "--json")
    batch = json.loads(done.stdout)
    assert (batch["status"], batch["input_uri"], batch["output_uri"]) == ("completed", source, folder.rstrip("/"))
    assert answers.read_bytes() == running.get("cli/output.jsonl")
    assert checked(running, "cli", tmp_path, 40)["batch_id"] == batch["id"]
    refused = running.cli("submit", source, "--output-uri", folder, "--wait", status=1)
    assert "output_uri_taken" in refused.stderr


def test_by_the_sdk_and_plain_http(running, tmp_path):
    running.client.put_object(Bucket=running.bucket, Key="in/job.jsonl", Body=lines(10))
    uris = {"input_uri": f"s3://{running.bucket}/in/job.jsonl", "output_uri": f"s3://{running.bucket}/http"}
    answer = running.tenant.http.post("/v1/batches", json={"endpoint": CHAT, "completion_window": "1h"} | uris)
    assert answer.status_code == 200, answer.text
    second = running.tenant.http.post("/v1/batches", json={"endpoint": CHAT, "completion_window": "1h", "metadata": {"n": "2"}} | uris)
    assert (second.status_code, second.json()["error"]["param"]) == (409, "output_uri")
    sdk = running.tenant.sdk()
    batch = sdk.batches.retrieve(answer.json()["id"])
    announced = batch.input_file_id
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        batch = sdk.batches.retrieve(batch.id)
    assert (batch.status, batch.input_file_id) == ("completed", announced)
    assert sdk.files.content(batch.output_file_id).content == running.get("http/output.jsonl")
    assert sdk.files.content(batch.input_file_id).content == lines(10)
    manifest = checked(running, "http", tmp_path, 10)
    assert manifest["input"]["etag"] == answer_of(running, batch.id)["input_etag"]
    cost = json.loads(running.get("http/cost.json"))
    assert cost["amount"] == answer_of(running, f"{batch.id}/cost")["amount"]


def answer_of(running, path):
    return running.tenant.http.get(f"/v1/batches/{path}").json()


def test_credentials_go_in_and_never_come_out(running, guarded, tmp_path):
    project = running.tenant.project_id
    set_it = (
        "s3",
        "credentials",
        "set",
        "--project",
        project,
        "--access-key-id",
        "right",
        "--path-style",
        "--endpoint-url",
        guarded.endpoint_url,
    )
    assert "No secret on stdin" in running.cli(*set_it, status=1).stderr
    said = running.cli(*set_it, stdin="wrong-one\n")
    shown = running.cli("s3", "credentials", "show", "--project", project, "--json")
    assert json.loads(shown.stdout)["access_key_id"] == "right"
    assert all("wrong-one" not in f"{done.stdout}{done.stderr}" for done in (said, shown))
    assert oct((tmp_path / "credentials_key").stat().st_mode & 0o777) == "0o600"
    refused = running.cli("submit", "s3://bucket/nothing.jsonl", "--endpoint", CHAT, "--wait", status=1)
    assert "input_uri_denied" in refused.stderr
    running.cli("s3", "credentials", "delete", "--project", project)
    with running.services.database.begin() as uow:
        assert uow.bucket_access.get(project) is None


def test_files_past_the_api(running, tmp_path):
    job = tmp_path / "job.jsonl"
    job.write_bytes(lines(3))
    signed = json.loads(running.cli("files", "upload-url", job, "--json").stdout)
    assert httpx.put(signed["url"], content=job.read_bytes(), headers=signed["headers"]).status_code == 200
    assert running.cli("files", "register", signed["file_id"]).stdout.strip() == signed["file_id"]
    url = running.cli("files", "download-url", signed["file_id"]).stdout.strip()
    assert httpx.get(url).content == job.read_bytes()
