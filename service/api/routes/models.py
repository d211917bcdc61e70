"""The models that lines may name."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.auth import Reader
from service.api.context import Ctx
from service.api.wire import ModelList, ModelObject
from service.config import Settings
from service.errors import NotFound

router = APIRouter(prefix="/v1/models", tags=["Models"])


@router.get("", summary="List models")
def list_models(_caller: Reader, ctx: Ctx) -> ModelList:
    """All models that the operator registered, and their aliases."""
    return ModelList(data=[_model_object(ctx.settings, name, root) for name, root in _names(ctx.settings).items()])


@router.get("/{model:path}", summary="Retrieve a model")
def retrieve_model(model: str, _caller: Reader, ctx: Ctx) -> ModelObject:
    """A model or alias by name."""
    root = ctx.settings.resolve_model(model)
    if root is None:
        raise NotFound(f"The model {model[:200]!r} does not exist here; see GET /v1/models.", param="model", code="model_not_found")
    return _model_object(ctx.settings, model, root)


def _names(settings: Settings) -> dict[str, str]:
    names = {name: name for name in settings.models}
    for name, entry in settings.models.items():
        for alias in entry.aliases:
            names.setdefault(alias, name)
    return names


def _model_object(settings: Settings, name: str, root: str) -> ModelObject:
    # The registry is configuration and has no dates; 0 is OpenAI's integer for "unknown" here.
    return ModelObject(id=name, created=0, root=root, aliases=list(settings.models[root].aliases))
