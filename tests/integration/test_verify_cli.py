"""`longdraft verify` against a running server: a batch's own files, the model in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from service.adapters.engine_runner import EngineRunner
from service.cli.local_run import read_job, run_job
from service.config import EngineSettings, ModelEntry
from service.domain.job import BatchStatus
from tests.integration.api_server import ApiServer, Tenant
from tests.tiny_model import make_tiny_model


def finished(api: ApiServer, tenant: Tenant, job: Path, output: bytes) -> str:
    """A completed batch with these files."""
    batch_id = str(tenant.create(tenant.upload(job.read_bytes())).json()["id"])
    made = api.put_file(tenant.project_id, output)
    with api.services.database.begin() as uow:
        batch = uow.batches.load(batch_id, lock=True).to(BatchStatus.IN_PROGRESS, uow.now, model="tiny", total=3)
        uow.batches.save(batch)
        batch = uow.batches.load(batch_id).to(BatchStatus.FINALIZING, uow.now, outcome=BatchStatus.COMPLETED)
        uow.batches.save(batch)
        uow.batches.save(batch.to(BatchStatus.COMPLETED, uow.now, output_file_id=made.id))
    return batch_id


def test_a_batch_is_verified_from_its_files(api: ApiServer, tenant: Tenant, tmp_path: Path) -> None:
    folder, job, output = make_tiny_model(tmp_path / "model"), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    bodies = [{**body, "messages": [{"role": "user", "content": f"line {number}"}], "n": number + 1} for number in range(3)]
    rows = [{"custom_id": f"l{n}", "method": "POST", "url": "/v1/chat/completions", "body": one} for n, one in enumerate(bodies)]
    job.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runner = EngineRunner({"tiny": ModelEntry(source=str(folder))}, EngineSettings(device="cpu", kv_memory="4MiB", threads=1), tmp_path)
    read = read_job(job, lambda _: "tiny", max_line_bytes=1 << 20, max_json_depth=50)
    assert run_job(read, job, output, runner, drafter="auto", tick=lambda _: None).failed == 0
    right = finished(api, tenant, job, output.read_bytes())
    answers = [json.loads(line) for line in output.read_bytes().splitlines()]
    answers[2]["response"]["body"]["choices"][1]["message"]["content"] += "!"
    wrong = finished(api, tenant, job, b"".join(json.dumps(answer).encode() + b"\n" for answer in answers))
    (tmp_path / "longdraft.toml").write_text(f'[models.tiny]\nsource = "{folder}"\n[engine]\nkv_memory = "4MiB"\ndevice = "cpu"\n')
    environment = os.environ | {
        "LONGDRAFT_URL": tenant.url,
        "LONGDRAFT_API_KEY": tenant.secret,
        "LONGDRAFT_DATA_DIR": str(tmp_path),
        "LONGDRAFT_CONFIG": str(tmp_path / "longdraft.toml"),
    }

    def verify(batch: str, status: int) -> dict:
        command = [sys.executable, "-m", "service.cli.main", "verify", batch, "--sample", "3", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, cwd=Path(__file__).parents[2])
        assert done.returncode == status, done.stdout + done.stderr
        return json.loads(done.stdout)

    report = verify(right, 0)
    assert (report["sampled"], report["compared"], report["equal"], report["pass"]) == (3, 3, 3, True)
    assert report["made"][0]["here"]["drafter"] == "off"
    report = verify(wrong, 1)
    assert [(found["custom_id"], found["choice"]) for found in report["differences"]] == [("l2", 1)]
