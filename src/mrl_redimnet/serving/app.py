"""A `Service` over HTTP: `create_app(service)` is a FastAPI application.

    uvicorn.run(create_app(Service(SpeakerEncoder.from_pretrained("nano"), open_store("speakers.db"))))

Audio is uploaded as a form's file, as base64 in JSON, or is the body itself. Every error is JSON:
{"error": {"code": a word for programs, "message": a sentence}}.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.extras import extra
from mrl_redimnet.serving.batcher import Pass
from mrl_redimnet.serving.service import Refused, Service

with extra("serve"):
    import python_multipart as _  # noqa: F401 forms are read by it, and its absence is told late
    from fastapi import APIRouter, Depends, FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser

FIELD_BYTES = 64 * 1024  # of a text field of a form
KEY_LENGTH = 16
CODE_HEADER = "x-error-code"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64)

# What requests may say beside audio: the type, and a sentence for the OpenAPI page.
VALUES: dict[str, tuple[type, str]] = {
    "adapter": (str, "Name of a loaded adapter, `none` (the model itself), or `auto` (the detector chooses). [none]"),
    "dim": (int, "How many numbers of the embedding, from the first on. [all]"),
    "threshold": (float, "Accept scores from this one on. [the saved threshold]"),
    "top": (int, "How many speakers to name. [3]"),
    "speaker": (str, "Name of an enrolled speaker."),
    "consent": (str, "Where the speaker's consent is recorded, such as the number of a form."),
}


@dataclass(frozen=True)
class Asked:
    """What a request says: {field: files}, and {field: value}."""

    audio: dict[str, list[bytes]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


class Keys:
    """API keys, of which only hashes are held."""

    def __init__(self, keys: list[str]) -> None:
        """Raises ValueError for none, or one with fewer than 16 characters."""
        if not keys or any(len(key) < KEY_LENGTH for key in keys):
            raise ValueError(f"keys: expected at least one, each of {KEY_LENGTH} characters or more.")
        self._hashes = [_hash(key) for key in keys]

    @classmethod
    def load(cls, file: str | Path) -> "Keys":
        """The keys in a text file, one a line; lines that begin with # are comments. Raises ValueError as the class."""
        lines = Path(file).read_text(encoding="utf-8").split("\n")
        try:
            return cls([line.strip() for line in lines if line.strip() and not line.startswith("#")])
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def know(self, key: str) -> bool:
        """Whether a key is one of them, in a time that does not tell how much of it is right."""
        return any(hmac.compare_digest(_hash(key), known) for known in self._hashes)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Metrics:
    """What Prometheus reads at /metrics. A registry of its own: several services may be in one process."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "mrl_redimnet", "registry": self.registry}
        self.requests = Counter("requests", "Requests, by what they were answered.", ["route", "status", "code"], **own)
        self.seconds = Histogram("request_seconds", "Until the answer.", ["route"], buckets=SECONDS, **own)
        self.count = 0  # in the thread of the event loop alone
        under_way = Gauge("requests_under_way", "Requests with audio that are not answered yet.", **own)
        under_way.set_function(lambda: self.count)
        self.decisions = Counter("decisions", "Decisions on speakers.", ["kind", "accepted"], **own)
        self.rows = Histogram("batch_rows", "Utterances that went through the network together.", buckets=ROWS, **own)
        self.batch = Histogram("batch_seconds", "Of a pass over the network.", buckets=SECONDS, **own)
        self.waited = Histogram("wait_seconds", "Of an utterance, until its pass began.", buckets=SECONDS, **own)
        self.speech = Counter("speech_seconds", "Of speech that was embedded.", **own)
        self.padding = Counter("padding_seconds", "Of silence that filled up batches.", **own)
        waiting = Gauge("waiting_requests", "Utterances that wait for the network.", **own)
        waiting.set_function(lambda: service.batcher.waiting[0])
        service.batcher.on_pass = self.passed
        service.on_decision = lambda kind, accepted: self.decisions.labels(kind, str(accepted).lower()).inc()

    @contextmanager
    def one_of(self, most: int) -> Iterator[None]:
        """Within, a request is under way. Raises Refused where `most` are."""
        if self.count >= most:
            raise Refused("too_many_requests", 503, f"{most} requests are under way, which is the limit: ask later.")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    def passed(self, one: Pass) -> None:
        """Counts a pass over the network."""
        self.rows.observe(one.rows)
        self.batch.observe(one.took)
        for seconds in one.waited:
            self.waited.observe(seconds)
        self.speech.inc(one.seconds)
        self.padding.inc(max(0.0, one.padded - one.seconds))


class Measured:
    """ASGI middleware that counts requests and their seconds."""

    def __init__(self, app: Callable[..., Any], metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Hands on a request and its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, answer = time.perf_counter(), {"status": 500, "code": "internal"}

        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                code = dict(message.get("headers", ())).get(CODE_HEADER.encode(), b"")
                answer.update(status=message["status"], code=code.decode())
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # not the address, of which there are many
            self.metrics.requests.labels(route, answer["status"], answer["code"]).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)


@dataclass(frozen=True)
class Operation:
    """A request with audio. main: the field that a body of plain audio is. work: answers what was asked."""

    summary: str
    main: str
    fields: tuple[str, ...]
    work: Callable[[Service, Asked], Coroutine[Any, Any, Any]]
    more: str = ""


OPERATIONS = {
    "/embed": Operation(
        "Embeddings of utterances",
        "audio",
        ("audio", "adapter", "dim"),
        lambda service, asked: service.embed(asked.audio.get("audio", []), **asked.values),
    ),
    "/verify": Operation(
        "Is this the same speaker?",
        "test",
        ("test", "enrol", "speaker", "adapter", "dim", "threshold"),
        lambda service, asked: service.verify(_one(asked, "test"), asked.audio.get("enrol", []), **asked.values),
        "Compares `test` with `enrol`, utterances of one speaker, or with an enrolled `speaker`. ",
    ),
    "/enrol": Operation(
        "Enrol a speaker, or add utterances to one",
        "audio",
        ("audio", "speaker", "consent", "adapter", "dim"),
        lambda service, asked: service.enrol(audio=asked.audio.get("audio", []), **_with(asked, "speaker")),
    ),
    "/identify": Operation(
        "Which of the enrolled speakers is it?",
        "test",
        ("test", "adapter", "dim", "threshold", "top"),
        lambda service, asked: service.identify(_one(asked, "test"), **asked.values),
    ),
    "/classify": Operation(
        "What the classifier of an adapter or of the model says",
        "audio",
        ("audio", "adapter"),
        lambda service, asked: service.classify(_one(asked, "audio"), **asked.values),
    ),
}


def create_app(service: Service, keys: Keys | None = None, *, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """The application. It closes the service when it ends.

    Args:
        service: answers.
        keys: without one of these, in the header `Authorization: Bearer KEY`, nothing is answered but /health, /ready
            and the OpenAPI page; None: everybody may ask.
        hosts: names that requests may call this machine, in their header Host; None: any. Without keys, a service for
            one machine should know its names: they keep web pages that its user visits from asking it.
    """
    metrics, ready = Metrics(service), asyncio.Event()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        noise = 0.01 * np.random.default_rng(0).standard_normal(2 * SAMPLING_RATE)
        await service.batcher.embed_async(noise.astype(np.float32))  # the first pass is slow
        ready.set()
        yield
        ready.clear()
        await asyncio.to_thread(service.close)

    bearer_key = Depends(HTTPBearer(auto_error=False, description="An API key, where the service has keys."))

    def check(request: Request, given: HTTPAuthorizationCredentials | None = bearer_key) -> None:
        if hosts is not None and request.url.hostname not in hosts:
            raise Refused("wrong_host", 403, "This service is not to be asked by that name of its machine.")
        origin = request.headers.get("origin")
        if keys is None and origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise Refused("wrong_origin", 403, "Pages of other websites may not ask this service.")
        if keys is not None and (given is None or not keys.know(given.credentials)):
            raise Refused("unauthorised", 401, "Give an API key in the header: Authorization: Bearer KEY.")

    app = FastAPI(
        title="Speaker service",
        version=version("mrl-redimnet"),
        description=f"Speaker embeddings, verification and identification with {service.encoder.name}.",
        lifespan=life,
    )
    app.add_middleware(Measured, metrics=metrics)
    _answer_errors(app)
    _answer_state(app, service, ready)
    guarded = APIRouter(
        dependencies=[Depends(check)], responses={"default": {"description": "An error", "content": _json(ERROR)}}
    )
    for path, operation in OPERATIONS.items():
        guarded.add_api_route(
            path,
            _endpoint(operation, service, metrics),
            methods=["POST"],
            name=path[1:],
            summary=operation.summary,
            description=operation.more + HOW,
            openapi_extra={"requestBody": _body(operation.main, operation.fields)},
        )
    _answer_about_speakers(guarded, service)
    _answer_about_adapters(guarded, service)

    @guarded.get("/metrics", summary="For Prometheus", response_class=Response)
    async def scraped() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(guarded)
    return app


def _endpoint(operation: Operation, service: Service, metrics: Metrics) -> Callable[[Request], Any]:
    """Reads a request, within the limits, and answers it; stops where nobody waits for the answer any more."""

    async def endpoint(request: Request) -> Response:
        with metrics.one_of(service.limits.requests):
            asked = await read_request(request, operation.main, operation.fields, service.limits.bytes)
            return await _unless_gone(request, operation.work(service, asked))

    return endpoint


def _answer_about_speakers(router: APIRouter, service: Service) -> None:
    @router.get("/speakers", summary="Who is enrolled")
    async def speakers(after: str = "", limit: int = 1000) -> Any:
        return await service.speakers(after=after, limit=max(1, min(limit, 10_000)))

    @router.get("/speakers/{speaker:path}", summary="One speaker")
    async def speaker(speaker: str) -> Any:
        return await service.speakers(speaker)

    @router.delete("/speakers/{speaker:path}", summary="Forget a speaker for good")
    async def forget(speaker: str) -> Any:
        return await service.delete(speaker)

    @router.get("/decisions", summary="The latest logged decisions")
    async def decisions(limit: int = 1000) -> Any:
        return await service.decisions(max(1, min(limit, 100_000)))


def _answer_about_adapters(router: APIRouter, service: Service) -> None:
    @router.get("/adapters", summary="The model and the loaded adapters")
    async def adapters() -> Any:
        return service.list_adapters()

    @router.put("/adapters/{name}", summary="Load an adapter from the Hub")
    async def load_adapter(name: str, repository: str, revision: str | None = None) -> Any:
        return await service.load_adapter(name, repository, revision)

    @router.delete("/adapters/{name}", summary="Unload an adapter")
    async def delete_adapter(name: str) -> Any:
        return await service.delete_adapter(name)


def _answer_state(app: FastAPI, service: Service, started: asyncio.Event) -> None:
    @app.get("/health", summary="Whether the service works at all")
    async def health() -> Any:
        if not service.batcher.running:
            raise Refused("stopped", 503, "The thread that runs the network has ended: start the service again.")
        return {"status": "ok"}

    @app.get("/ready", summary="Whether requests are to be sent here now")
    async def ready() -> Any:
        if not started.is_set() or not service.batcher.running:
            raise Refused("not_ready", 503, "The service is starting or stopping.")
        return {"status": "ready"}


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _error(error.code, error.status, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        return _error("bad_request", 422, f"{wrong}.")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _error("not_found" if error.status_code == 404 else "http", error.status_code, f"{error.detail}.")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _error("internal", 500, "The service failed; its log says why.")  # uvicorn logs the error


# ---------------------------------------------------------------- requests


async def read_request(request: Request, main: str, fields: tuple[str, ...], most: int) -> Asked:
    """What a request says, in its address and its body: a form, JSON, or audio, which is then the field `main`.

    fields: that are known. most: bytes of the body. Raises Refused for others, for values of another type, and for a
    body that is larger or broken.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    audio: dict[str, list[bytes]] = {}
    values: dict[str, Any] = dict(request.query_params)
    if kind == "multipart/form-data":
        await _form(request, most, audio, values)
    else:
        body = b"".join([part async for part in _limited(request, most)])
        if kind == "application/json":
            _from_json(body, fields, audio, values)
        elif kind == "application/x-www-form-urlencoded" and body:  # what curl -d says of itself
            raise Refused(
                "bad_request", 415, "Give audio as a form's file (curl -F), as JSON, or as the body with its own type."
            )
        elif body:
            audio[main] = [body]
    if unknown := sorted({*audio, *values} - set(fields)):
        raise Refused("unknown_field", 422, f"{', '.join(unknown)}: not known here; known are: {', '.join(fields)}.")
    if no_files := sorted(set(values) - set(VALUES)):
        raise Refused("bad_request", 422, f"{', '.join(no_files)}: expected a file.")
    if files := sorted(set(audio) & set(VALUES)):
        raise Refused("bad_request", 422, f"{', '.join(files)}: expected a value, not a file.")
    return Asked(audio, {name: _value(name, value) for name, value in values.items() if value is not None})


async def _limited(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body. Raises Refused as soon as it is too large, or is said to be."""
    refused = Refused("too_large", 413, f"The request is too large: this service takes {most:,} bytes.")
    if int(request.headers.get("content-length", 0)) > most:  # uvicorn has checked that it is a number
        raise refused
    read = 0
    async for part in request.stream():
        read += len(part)
        if read > most:
            raise refused
        yield part


async def _form(request: Request, most: int, audio: dict[str, list[bytes]], values: dict[str, Any]) -> None:
    stream = _limited(request, most)
    parser = MultiPartParser(request.headers, stream, max_files=1000, max_fields=100, max_part_size=FIELD_BYTES)
    parser.spool_max_size = most + 1  # no file is ever written to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused("bad_request", 400, f"The form cannot be read: {error}.") from error
    async with _closing(form):
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                audio.setdefault(name, []).append(await value.read())
            else:
                values[name] = value


@asynccontextmanager
async def _closing(form: Any) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await form.close()


def _from_json(body: bytes, fields: tuple[str, ...], audio: dict[str, list[bytes]], values: dict[str, Any]) -> None:
    try:
        content = json.loads(body)
    except ValueError as error:
        raise Refused("bad_request", 400, f"The JSON cannot be read: {error}.") from error
    if not isinstance(content, Mapping):
        raise Refused("bad_request", 400, "The JSON is no object: give {...}.")
    for name, value in content.items():
        if name in VALUES or name not in fields:
            values[name] = value
            continue
        texts = value if isinstance(value, list) else [value]
        try:
            audio[name] = [base64.b64decode(text, validate=True) for text in texts]
        except (binascii.Error, ValueError, TypeError) as error:
            raise Refused(
                "bad_request", 422, f"{name}: expected base64 of an audio file, or a list of them."
            ) from error


def _value(name: str, given: Any) -> Any:
    """A value by its type; numbers may be texts, as they are in forms and addresses."""
    kind = VALUES[name][0]
    try:
        if isinstance(given, bool) or not isinstance(given, str if kind is str else int | float | str):
            raise ValueError(name)
        value = kind(given)
        if kind is not str and (not math.isfinite(value) or value != float(given)):
            raise ValueError(name)
    except (ValueError, OverflowError) as error:
        what = {str: "a text", int: "a whole number", float: "a number"}[kind]
        raise Refused("bad_request", 422, f"{name}: got {given!r}, expected {what}.") from error
    return value


def _with(asked: Asked, name: str) -> dict[str, Any]:
    """The values, of which one must be there."""
    if name not in asked.values:
        raise Refused(f"{name}_missing", 422, f"`{name}` is missing: {VALUES[name][1]}")
    return asked.values


def _one(asked: Asked, name: str) -> bytes:
    files = asked.audio.get(name, [])
    if len(files) != 1:
        raise Refused("audio_missing", 422, f"`{name}`: got {len(files)} audio files, expected one.")
    return files[0]


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """Does the work, and withdraws it where the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Refused("gone", 499, "The client has gone.")  # nobody reads it, but it is counted
        return JSONResponse(doing.result())
    finally:
        watching.cancel()
        doing.cancel()


# ---------------------------------------------------------------- answers, and their description

ERROR = {
    "type": "object",
    "properties": {
        "error": {"type": "object", "properties": {"code": {"type": "string"}, "message": {"type": "string"}}}
    },
}
HOW = (
    "Audio in any common format, mono or not, at any rate: as a file of a form, as base64 in JSON, or as the body "
    "itself, with the other fields in the address."
)


def _error(code: str, status: int, message: str) -> Response:
    headers = {CODE_HEADER: code}
    if status == 503:
        headers["retry-after"] = "1"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _body(main: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """What OpenAPI says of a request's body."""
    types = {str: "string", int: "integer", float: "number"}
    values = {
        name: {"type": types[VALUES[name][0]], "description": VALUES[name][1]} for name in fields if name in VALUES
    }
    audio = [name for name in fields if name not in VALUES]
    file, text = {"type": "string", "format": "binary"}, {"type": "string", "format": "byte"}

    def schema(kind: dict[str, str]) -> dict[str, Any]:
        files = {name: kind if name == "test" else {"type": "array", "items": kind} for name in audio}
        return {"schema": {"type": "object", "properties": {**files, **values}, "required": [main]}}

    content = {"multipart/form-data": schema(file), "application/json": schema(text)}
    content["audio/*"] = {"schema": file}
    return {"required": True, "content": content}
