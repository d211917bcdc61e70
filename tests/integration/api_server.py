"""The real application on a real port, for tests that speak HTTP to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import uvicorn
from openai import OpenAI

from service.api.app import create_app
from service.bootstrap import Services
from service.domain.account import ApiKey, File, FilePurpose
from service.domain.ids import new_file_id
from service.usecases.keys import create_key

LINE = b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}}\n'


@dataclass(frozen=True)
class Tenant:
    """A project with a key, and clients that use it."""

    url: str
    project_id: str
    key: ApiKey
    secret: str
    http: httpx.Client

    def sdk(self, **options: Any) -> OpenAI:
        """The stock SDK, rejecting every answer that differs from its types, and repeating nothing by itself."""
        settings = {"max_retries": 0, "_strict_response_validation": True} | options
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.secret, **settings)

    def upload(self, content: bytes = LINE, *, filename: str = "in.jsonl") -> str:
        answer = self.http.post("/v1/files", files={"file": (filename, content)}, data={"purpose": "batch"})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def create(self, file_id: str | None = None, *, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
        """POST /v1/batches with good values, some of them changed; `...` leaves one out."""
        body = {"input_file_id": file_id or self.upload(), "endpoint": "/v1/chat/completions", "completion_window": "24h"} | changes
        return self.http.post("/v1/batches", json={k: v for k, v in body.items() if v is not ...}, headers=headers)


@dataclass(frozen=True)
class ApiServer:
    """A running server and what it works on."""

    url: str
    services: Services

    @contextmanager
    def tenant(self, project_id: str | None = None, *, scopes: tuple[str, ...] = ("all",)) -> Iterator[Tenant]:
        """A key for a project, which is a new one unless it is named."""
        database = self.services.database
        if project_id is None:
            with database.begin() as uow:
                project_id = uow.accounts.add_project(f"project {uuid4().hex}").id
        key, secret = create_key(database, project_id, "test", pepper=self.services.settings.key_pepper, scopes=scopes)
        with httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {secret}"}, timeout=30) as http:
            yield Tenant(self.url, project_id, key, secret, http)

    def stored(self) -> set[str]:
        """Every file of the blob store, unfinished ones too."""
        root = self.services.settings.data_dir / "blobs"
        return {str(path) for path in root.rglob("*") if path.is_file()}

    def put_file(self, project_id: str, content: bytes, **changes: Any) -> File:
        """A finished output file, as finalisation leaves it."""
        file_id = new_file_id()
        info = self.services.blobs.put(f"outputs/test/{file_id}", content)
        with self.services.database.begin() as uow:
            values: dict[str, Any] = {
                "id": file_id,
                "project_id": project_id,
                "purpose": FilePurpose.BATCH_OUTPUT,
                "filename": "output.jsonl",
                "bytes": len(content),
                "sha256": info.sha256 or "",
                "storage_key": info.key,
                "created_at": uow.now,
            }
            file = File(**(values | changes))
            uow.files.add(file)
        return file


@contextmanager
def serve(services: Services) -> Iterator[ApiServer]:
    """Runs the application in a thread until the block ends."""
    config = uvicorn.Config(create_app(services), host="127.0.0.1", port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield ApiServer(f"http://127.0.0.1:{port}", services)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
