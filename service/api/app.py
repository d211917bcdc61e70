"""The HTTP service: routes, errors and documentation put together. Everything it works with is handed in."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse

from service.api.context import Context
from service.api.create_body import CreateBatchBody
from service.api.errors import install_error_handlers
from service.api.guard import Guard, Observe
from service.api.page import render_page
from service.api.routes import batches, files, health, models, organization, presigned
from service.bootstrap import Services, local_tokenizers

DESCRIPTION = """\
Batch inference in the shapes of OpenAI's API. The stock `openai` SDKs work with it: set `base_url` to this server's `/v1` and
`api_key` to a key of a project. Every error is `{"error": {"message", "type", "param", "code"}}`."""


def create_app(services: Services, observe: Observe | None = None) -> FastAPI:
    """The ASGI application. Starts nothing and owns nothing: closing `services` is up to the caller. `observe` is told of every request."""
    app = FastAPI(
        title="Longdraft",
        version=version("longdraft"),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]  # FastAPI's documented way to change the description
    app.state.context = Context(services.settings, services.database, services.blobs, services.buckets, local_tokenizers(services.settings))
    app.add_middleware(Guard, observe=observe)
    install_error_handlers(app)
    for module in (presigned, files, batches, models, organization, health):
        app.include_router(module.router)

    @app.get("/docs", include_in_schema=False)
    def documentation() -> HTMLResponse:
        """Self-contained: FastAPI's own pages fetch scripts from elsewhere."""
        return HTMLResponse(
            render_page(app.openapi()), headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        )

    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """FastAPI's OpenAPI document, with the errors that are really sent: 400 and 401 in OpenAI's shape where it writes 422 of its own."""
    if app.openapi_schema is None:
        spec = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = spec["components"]["schemas"]
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        body = CreateBatchBody.model_json_schema(ref_template="#/components/schemas/{model}")
        upload = presigned.UploadUrlBody.model_json_schema(ref_template="#/components/schemas/{model}")
        # Read by hand (size and depth first), so FastAPI does not know them.
        schemas |= body.pop("$defs") | upload.pop("$defs") | {"CreateBatchBody": body, "UploadUrlBody": upload}
        refusal = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorObject"}}}}
        for path, operations in spec["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if path.startswith("/v1/"):
                    operation["responses"] |= {
                        "400": {"description": "Bad request"} | refusal,
                        "401": {"description": "No valid key"} | refusal,
                    }
        app.openapi_schema = spec
    return app.openapi_schema
