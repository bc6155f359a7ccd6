"""The routes: OpenAI's completions and chats, models, health, metrics, and the page.

Every error is OpenAI's object with a sentence. A client that goes away frees its slots at once, streaming or not.
"""

import asyncio
import dataclasses
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from megatron_mixtral.errors import MixtralError
from megatron_mixtral.inference import Generator
from megatron_mixtral.inference import cli as inference
from megatron_mixtral.server.answers import Answer, TokenTexts
from megatron_mixtral.server.desk import Closed, Desk, Full, Ticket
from megatron_mixtral.server.metrics import TYPE, Metrics
from megatron_mixtral.server.requests import Asked, Refused, parse, unknown
from megatron_mixtral.server.settings import Settings

PAGE = Path(__file__).with_name("page.html")
BODY_SECONDS = 30.0  # in which the body of a request has to come
_LONG = 2**14  # characters
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                               "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}


class Api:
    """The web's side of a server: everything between HTTP and the desk."""

    def __init__(self, desk: Desk, generator: Generator, prompts: Any, settings: Settings) -> None:
        self.desk, self.settings, self.metrics, self.started = desk, settings, Metrics(), int(time.time())
        self._generator, self._prompts, self._texts = generator, prompts, TokenTexts(generator.tokenizer)
        # Encoding must not hold up the event loop, nor a long text the short ones: long ones wait for one another.
        self._encoders = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("encoder", "encoder-of-long")]

    async def answer(self, kind: str, request: Request) -> Response:
        """Answer a chat or a completion."""
        since = time.monotonic()
        asked = parse(kind, await self._body(request), self.settings.names)
        encoder = self._encoders[asked.characters > _LONG]
        prompts = await asyncio.get_running_loop().run_in_executor(encoder, self._ids, asked)
        params = dataclasses.replace(asked.params, adapter=asked.model == self.settings.adapter)
        if kind == "chat":
            params = inference.with_ends(params, self._prompts)
        ticket = self.desk.submit(prompts, params)
        self.metrics.add("prompt_tokens_total", sum(map(len, prompts)))
        answer = Answer(kind, asked, map(len, prompts), self._texts, self._prompts.begin)
        writing = _Writing(self, ticket, answer, since)
        if asked.stream:
            return _EventStream(writing, asked.usage)
        return await _unless_gone(request.receive, writing.whole(), ticket)

    def models(self) -> Mapping[str, Any]:
        """OpenAI's list of the model and, where it has adapters, of the model with them."""
        return {"object": "list", "data": [self.model(name) for name in self.settings.names]}

    def model(self, name: str) -> Mapping[str, Any]:
        """OpenAI's object of a model."""
        if name not in self.settings.names:
            raise unknown(name, self.settings.names)
        return {"id": name, "object": "model", "created": self.started, "owned_by": "megatron-mixtral"}

    def check(self, request: Request) -> None:
        """Raises `Refused` for a request that is not for us: without the key, or of another site by a name of its own
        that leads to this machine.
        """
        host = request.url.hostname or ""
        if self.settings.host in _LOOPBACK and host not in _LOOPBACK:
            raise Refused(403, f"the host {host[:80]!r} is not this server's, which listens on {self.settings.host}: "
                               "ask for localhost, or start it with --host 0.0.0.0 and --api-key")
        if self.settings.api_key is not None and request.url.path.startswith("/v1/"):
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.settings.api_key.encode()):
                raise Refused(401, "the key is missing or wrong: send the server's --api-key as Authorization: Bearer "
                                   "KEY", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise Refused(400, f"the Content-Type is {kind[:80]!r}, expected application/json")
        body, most = bytearray(), self.settings.max_body
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise Refused(413, f"the body is longer than {most} bytes (--max-body)")
        except TimeoutError as error:
            raise Refused(408, f"the body did not come in {BODY_SECONDS:.0f} s") from error
        return bytes(body)

    def _ids(self, asked: Asked) -> list[list[int]]:
        if asked.messages:
            return [self._prompts.prompt(asked.messages)]
        return [self._generator.encode(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts]


class _Writing:
    """An answer that is being written."""

    def __init__(self, api: Api, ticket: Ticket, answer: Answer, since: float) -> None:
        self.ticket, self.answer, self._api, self._since = ticket, answer, api, since

    async def whole(self) -> Response:
        async for _ in self.chunks():
            pass
        return JSONResponse(self.answer.whole())

    async def chunks(self) -> Any:
        """The chunks as they come. Raises `Refused` when time is up."""
        metrics, limit, first = self._api.metrics, self._api.settings.request_timeout, True
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + limit):
                async for prompt, event in self.ticket.events():
                    if first:
                        metrics.observe("first_token_seconds", time.monotonic() - self._since)
                        first = False
                    metrics.add("generated_tokens_total", len(event.token_ids))
                    chunk = self.answer.take(prompt, event)
                    if chunk is not None:
                        yield chunk
        except TimeoutError as error:
            raise Refused(504, f"the answer took longer than {limit:g} s (--request-timeout)") from error
        finally:
            metrics.observe("request_seconds", time.monotonic() - self._since)


class _EventStream(Response):
    """Server-sent events, one for each chunk. It watches its client even while there is nothing to send."""

    media_type = "text/event-stream"

    def __init__(self, writing: _Writing, usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._writing, self._usage = writing, usage
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await _unless_gone(receive, self._send(send), self._writing.ticket)

    async def _send(self, send: Callable[[Any], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def say(content: Any, more: bool = True) -> None:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

        try:
            async for chunk in self._writing.chunks():
                await say(chunk)
            if self._usage:
                await say(self._writing.answer.usage_chunk())
        except MixtralError as error:
            await say(refusal(error).body())
        await say("[DONE]", more=False)


async def _unless_gone(receive: Callable[[], Awaitable[Any]], work: Any, ticket: Ticket) -> Any:
    """What `work` gives, unless its client goes first; then it ends, and its slots are free."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)
    finally:
        ticket.close()
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def refusal(error: MixtralError) -> Refused:
    """The answer for an error."""
    if isinstance(error, Refused):
        return error
    status = 429 if isinstance(error, Full) else 503 if isinstance(error, Closed) else 400
    return Refused(status, str(error))


def error_response(error: Refused) -> Response:
    """OpenAI's error. Clients that ask again by themselves are told when that is of no use."""
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {"Retry-After": "1"} if error.status == 429 \
        else {"x-should-retry": "false"}
    return JSONResponse(error.body(), error.status, headers)


def application(api: Api) -> Callable[..., Awaitable[None]]:
    """The ASGI application."""
    app = FastAPI(openapi_url=None)  # its own pages of documentation would load scripts from elsewhere

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if api.desk.closed is None else error_response(refusal(api.desk.closed))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(api.metrics.text(api.desk.engine), media_type=TYPE)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(api.models())

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(api.model(name))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await api.answer("completion", request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await api.answer("chat", request)

    @app.exception_handler(MixtralError)
    async def refused(request: Request, error: MixtralError) -> Response:
        return error_response(refusal(error))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        routes = "GET /v1/models, POST /v1/completions, POST /v1/chat/completions, GET /health, /metrics and /"
        return error_response(Refused(error.status_code, f"{request.method} {request.url.path[:80]}: "
                                                         f"{error.detail}; there are {routes}"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(Refused(500, f"the server has a fault: {type(error).__name__}; its log says more"))

    return _watched(app, api)


def _watched(app: FastAPI, api: Api) -> Callable[..., Awaitable[None]]:
    """The application behind the check of who asks, with every answer counted."""
    paths = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in paths else "other"
                api.metrics.add("requests_total", path=path, status=message["status"])
            await send(message)

        try:
            api.check(Request(scope))
        except Refused as error:
            return await error_response(error)(scope, receive, counted)
        return await app(scope, receive, counted)

    return outer
