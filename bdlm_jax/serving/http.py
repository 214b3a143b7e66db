"""A small HTTP server over one arm of a run, of the extra `http`: FastAPI, started by `python -m bdlm_jax.serving`.

All is read before the first request, and no request touches the disk: a request names users and items, never files.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from bdlm_jax import __version__
from bdlm_jax.serving import answers
from bdlm_jax.serving.artefact import Arm
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

MOST_BYTES = 1_000_000  # of a body
MOST_USERS, MOST_HISTORY, MOST_ITEMS, MOST_LETTERS = 256, 1000, 1000, 300

Name = Annotated[str, Field(min_length=1, max_length=MOST_LETTERS)]
History = Annotated[list[Name], Field(min_length=1, max_length=MOST_HISTORY)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a misspelt field is told, not overlooked
    k: Annotated[int, Field(ge=1, le=MOST_ITEMS)] = 10


class One(_Asked):
    """A known user by raw id, or a new one by history: item ids or whole titles, oldest first."""

    user: Name | None = None
    history: History | None = None


class Many(_Asked):
    """Several of either kind."""

    users: Annotated[list[Name], Field(min_length=1, max_length=MOST_USERS)] | None = None
    histories: Annotated[list[History], Field(min_length=1, max_length=MOST_USERS)] | None = None


class Item(BaseModel):
    """A recommended item; scores compare within one answer."""

    rank: int
    item: str
    title: str
    score: float


def make_app(catalogue: Catalogue, arm: Arm, *, name: str) -> fastapi.FastAPI:
    """Makes the application: GET /health, POST /recommend (of `One`) and POST /batch (of `Many`).

    What cannot be used is answered by 422 and {"detail": one sentence}, a body of more than MOST_BYTES by 413.
    """
    # No pages: theirs load scripts from elsewhere. /openapi.json describes the service.
    app = fastapi.FastAPI(title="bdlm_jax", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BoundedBody)

    @app.exception_handler(InputError)
    def explain(_: fastapi.Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422)

    @app.exception_handler(RequestValidationError)
    def name_field(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]  # without what was given, which may be anything
        return JSONResponse({"detail": f"{'.'.join(map(str, first['loc']))}: {first['msg']}."}, status_code=422)

    def ask(k: int, **who: list | None) -> list[list[dict]]:
        return answers.recommend(catalogue, arm, k=k, exact=True, **who)

    @app.get("/health")
    def health() -> dict[str, str | int]:
        sizes = {"users": len(catalogue.user_ids), "items": len(catalogue.item_ids)}
        return {"status": "ok", "arm": name, "version": __version__, **sizes}

    @app.post("/recommend")
    def recommend(asked: One) -> list[Item]:
        users, histories = ([one] if one is not None else None for one in (asked.user, asked.history))
        return ask(asked.k, users=users, histories=histories)[0]

    @app.post("/batch")
    def batch(asked: Many) -> list[list[Item]]:
        return ask(asked.k, users=asked.users, histories=asked.histories)

    return app


class BoundedBody:
    """Reads a request's body up to MOST_BYTES, whatever its headers say, and answers 413 above."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BYTES:
                told = JSONResponse({"detail": f"a body of more than {MOST_BYTES} bytes is not read."}, 413)
                return await told(scope, receive, send)
        messages = iter([{"type": "http.request", "body": bytes(body)}])

        async def replay() -> dict:
            return next(messages, None) or await receive()

        return await self.app(scope, replay, send)
