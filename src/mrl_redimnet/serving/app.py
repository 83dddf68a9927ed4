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
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, MutableMapping
from contextlib import asynccontextmanager
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
    from fastapi import Depends, FastAPI, Request, Response
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
        return any([hmac.compare_digest(_hash(key), known) for known in self._hashes])


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Metrics:
    """What Prometheus reads at /metrics. A registry of its own: several services may be in one process."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "mrl_redimnet", "registry": self.registry}
        self.requests = Counter("requests", "Requests, by what they were answered.", ["route", "status", "code"], **own)
        self.seconds = Histogram("request_seconds", "Until the answer.", ["route"], buckets=SECONDS, **own)
        self.under_way = Gauge("requests_under_way", "Requests that are not answered yet.", **own)
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


def create_app(service: Service, keys: Keys | None = None, *, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """The application. It closes the service when it ends.

    Args:
        service: answers.
        keys: without one of these, in the header `Authorization: Bearer KEY`, nothing is answered but /health, /ready
            and the OpenAPI page; None: everybody may ask.
        hosts: names that requests may call this machine, in their header Host; None: any. Without keys, a service for
            one machine should know its names: they keep web pages that its user visits from asking it.

    Raises:
        ModuleNotFoundError: without the packages of the extra `serve`.
    """
    metrics, state = Metrics(service), {"ready": False}

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        noise = 0.01 * np.random.default_rng(0).standard_normal(2 * SAMPLING_RATE)
        await service.batcher.embed_async(noise.astype(np.float32))  # the first pass is slow
        state["ready"] = True
        yield
        state["ready"] = False
        await asyncio.to_thread(service.close)

    bearer = HTTPBearer(auto_error=False, description="An API key, where the service was started with keys.")

    def check(request: Request, given: HTTPAuthorizationCredentials | None = Depends(bearer)) -> None:  # noqa: B008
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
    guarded = [Depends(check)]
    errors: dict[int | str, dict[str, Any]] = {"default": {"description": "An error", "content": _json(ERROR)}}

    async def carried_out(
        request: Request, main: str, fields: tuple[str, ...], work: Callable[[Asked], Coroutine[Any, Any, Any]]
    ) -> Response:
        """Reads a request, within the limits, and answers it; stops where nobody waits for the answer any more."""
        most = service.limits.requests
        if state.setdefault("under_way", 0) >= most:
            raise Refused("too_many_requests", 503, f"{most} requests are under way, which is the limit: ask later.")
        state["under_way"] += 1
        metrics.under_way.inc()
        try:
            asked = await read_request(request, main, fields, service.limits.bytes)
            return await _unless_gone(request, work(asked))
        finally:
            state["under_way"] -= 1
            metrics.under_way.dec()

    app.add_middleware(Measured, metrics=metrics)

    def audio_route(path: str, summary: str, main: str, fields: tuple[str, ...], more: str = "") -> Any:
        return app.post(
            path,
            summary=summary,
            description=f"{more}\n\n{HOW}",
            dependencies=guarded,
            responses=errors,
            openapi_extra={"requestBody": _body(main, fields)},
        )

    @audio_route("/embed", "Embeddings of utterances", "audio", ("audio", "adapter", "dim"))
    async def embed(request: Request) -> Response:
        return await carried_out(
            request, "audio", ("audio", "adapter", "dim"), lambda asked: service.embed(_audio(asked), **asked.values)
        )

    verify_fields = ("test", "enrol", "speaker", "adapter", "dim", "threshold")

    @audio_route(
        "/verify",
        "Is this the same speaker?",
        "test",
        verify_fields,
        "Compares `test` with `enrol`, utterances of one speaker, or with an enrolled `speaker`.",
    )
    async def verify(request: Request) -> Response:
        return await carried_out(
            request,
            "test",
            verify_fields,
            lambda asked: service.verify(_one(asked, "test"), asked.audio.get("enrol", []), **asked.values),
        )

    enrol_fields = ("audio", "speaker", "consent", "adapter", "dim")

    @audio_route("/enrol", "Enrol a speaker, or add utterances to one", "audio", enrol_fields)
    async def enrol(request: Request) -> Response:
        def work(asked: Asked) -> Coroutine[Any, Any, Any]:
            values = dict(asked.values)
            if "speaker" not in values:
                raise Refused("speaker_missing", 422, "`speaker` is missing: give the name of the speaker to enrol.")
            return service.enrol(values.pop("speaker"), _audio(asked), **values)

        return await carried_out(request, "audio", enrol_fields, work)

    identify_fields = ("test", "adapter", "dim", "threshold", "top")

    @audio_route("/identify", "Which of the enrolled speakers is it?", "test", identify_fields)
    async def identify(request: Request) -> Response:
        return await carried_out(
            request, "test", identify_fields, lambda asked: service.identify(_one(asked, "test"), **asked.values)
        )

    @audio_route("/classify", "What the classifier of an adapter or of the model says", "audio", ("audio", "adapter"))
    async def classify(request: Request) -> Response:
        return await carried_out(
            request, "audio", ("audio", "adapter"), lambda asked: service.classify(_one(asked, "audio"), **asked.values)
        )

    @app.get("/speakers", summary="Who is enrolled", dependencies=guarded, responses=errors)
    async def speakers(after: str = "", limit: int = 1000) -> Any:
        return await service.speakers(after=after, limit=max(1, min(limit, 10_000)))

    @app.get("/speakers/{speaker:path}", summary="One speaker", dependencies=guarded, responses=errors)
    async def speaker(speaker: str) -> Any:
        return await service.speakers(speaker)

    @app.delete(
        "/speakers/{speaker:path}", summary="Forget a speaker for good", dependencies=guarded, responses=errors
    )
    async def forget(speaker: str) -> Any:
        return await service.delete(speaker)

    @app.get("/decisions", summary="The latest logged decisions", dependencies=guarded, responses=errors)
    async def decisions(limit: int = 1000) -> Any:
        return await service.decisions(max(1, min(limit, 100_000)))

    @app.get("/adapters", summary="The model and the loaded adapters", dependencies=guarded, responses=errors)
    async def adapters() -> Any:
        return service.list_adapters()

    @app.put("/adapters/{name}", summary="Load an adapter from the Hub", dependencies=guarded, responses=errors)
    async def load_adapter(name: str, repository: str, revision: str | None = None) -> Any:
        return await service.load_adapter(name, repository, revision)

    @app.delete("/adapters/{name}", summary="Unload an adapter", dependencies=guarded, responses=errors)
    async def delete_adapter(name: str) -> Any:
        return await service.delete_adapter(name)

    @app.get("/health", summary="Whether the service works at all")
    async def health() -> Any:
        if not service.batcher.running:
            raise Refused("stopped", 503, "The thread that runs the network has ended: start the service again.")
        return {"status": "ok"}

    @app.get("/ready", summary="Whether requests are to be sent here now")
    async def ready() -> Any:
        if not state["ready"] or not service.batcher.running:
            raise Refused("not_ready", 503, "The service is starting or stopping.")
        return {"status": "ready"}

    @app.get("/metrics", summary="For Prometheus", dependencies=guarded, response_class=Response)
    async def scraped() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

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

    return app


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


async def _limited(request: Request, most: int) -> AsyncIterator[bytes]:
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
            raise Refused("bad_request", 422, f"{name}: expected base64 of an audio file, or a list of them.") from error


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


def _audio(asked: Asked) -> list[bytes]:
    return asked.audio.get("audio", [])


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
