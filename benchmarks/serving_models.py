"""The same batches through FastAPI's response models, list[list[float]].

Run by ``benchmarks/serving.py`` under uvicorn, on the settings in the environment.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from backcast.lifecycle import open_backcast
from backcast.settings import Settings
from backcast.versions import Entity
from service.engine import Engine, Snapshot

MODELS = "/models"
"""Written by pydantic, which FastAPI does where no response class is named."""
MODELS_JSON = "/models-json"
"""Written by Python's json, which FastAPI does where JSONResponse is named."""


class BatchRequest(BaseModel):
    """A batch of ids."""

    ids: list[str]
    version: int


class BatchAnswer(BaseModel):
    """Their vectors, in the same order."""

    ids: list[str]
    embeddings: list[list[float]]


def from_environment() -> FastAPI:
    """Return the application, on the same store and maps as the service."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        settings = Settings.load()
        with open_backcast(settings) as backcast:
            engine = Engine(backcast.registry, backcast.artifacts, backcast.store, settings.device)
            engine.refresh()
            yield {"snapshot": engine.current()}

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    def ready() -> bool:
        return True

    @app.post(MODELS)
    @app.post(MODELS_JSON, response_class=JSONResponse)
    def post_batch(request: Request, batch: BatchRequest) -> BatchAnswer:
        snapshot = cast("Snapshot", request.state.snapshot)
        rows = snapshot.vectors(Entity.ITEM, batch.ids, batch.version)
        return BatchAnswer(ids=batch.ids, embeddings=rows.vectors.tolist())

    return app
