"""The door of the studio: which requests reach the page at all, from whom, and what an event may bring.

Gradio takes a file that an event names, {"path": ..., "meta": ...}, for one of its own, and on a mounted page it does
not ask whose it is. So none gets there: of an event only plain values of its inputs' types pass, all of gradio's ways
to send and fetch files are closed, and the page has its own, `routes`. They want the visitor's key, which is told to
its own page and to nobody else.
"""

import asyncio
import base64
import json
import math
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import quote

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from .layers import CHANGES

WRONG, WHILE = 10, 60.0  # passwords that an address may have wrong in so many seconds
EVENT, UPLOAD = 2**25, 2**28  # bytes that an event and an uploaded file may have
HELD, PATIENCE = 2**28, 120.0  # bytes of all events that are still arriving; seconds in which one has to
SILENT = 10.0  # seconds in which a connection's first request has to begin
MOST = 400  # connections at once, of which an address may have half
PARTS = 10_000  # that an event may consist of, which are quick to read
MAKERS = 2  # files that are made at once
ROOM = 2**30  # bytes that an upload leaves free on the disk
LOCAL = ("127.0.0.1", "localhost", "[::1]")
JOIN = "/gradio_api/queue/join"
HEARS = re.compile(r"/gradio_api/(?:queue/data|heartbeat/([\w-]+))")  # what an open page listens to
READ = re.compile(
    r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/[\w@-][\w.@/-]*|/save/[\w-]+/[a-z]+"
    rf"|/config|/gradio_api/info|{HEARS.pattern}"
)
WRITE = re.compile(rf"{JOIN}|/(open|stop)/[\w-]+")
PASSED = (b"host", b"accept", b"accept-encoding", b"content-type", b"content-length", b"x-forwarded-proto")
SEALS = {  # of every answer: no other page may frame it, embed its parts, or be sent to or loaded from by it
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'; object-src 'none'",
}
TYPES = {  # of what an event may bring for each kind of component; a State stays on the server
    "textbox": (str, type(None)),
    "slider": (int, float),
    "number": (int, float, type(None)),
    "radio": (str,),
    "checkbox": (bool,),
    "dataset": (int,),
    "state": (type(None),),
}
NUMBER = 2**64  # what a number stays below: a seed has 64 bits at most


class Refused(Exception):
    """A request that goes no further: HTTP status and why."""


class Auth(NamedTuple):
    """Who may come in. A link works once and leaves its cookie in the browser that used it."""

    password: str = ""  # USER:PASSWORD
    link: str = ""
    cookie: str = ""

    @property
    def asks(self) -> str:
        if self.cookie:
            return (
                "the link was used: only its browser may go on, by its cookie. Start the studio anew for another link"
            )
        return "user and password, please" if self.password else "open the link that was printed"

    def admits(self, request: Request) -> bool:
        basic = "Basic " + base64.b64encode(self.password.encode()).decode() if self.password else ""
        given = request.headers.get("authorization", ""), request.cookies.get("emilie", "")
        return not any(self) or any(want and same(has, want) for has, want in zip(given, (basic, self.cookie)))


def same(a: str, b: str) -> bool:
    return secrets.compare_digest(a.encode(), b.encode())


class Connection(H11Protocol):
    """One that is closed where it brings no request or is one too many: there could be any number of them."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        others = [one.client and one.client[0] for one in self.connections]
        if len(others) > MOST or others.count(self.client and self.client[0]) > max(1, MOST // 2):
            transport.close()
        self.loop.call_later(SILENT, lambda: self.cycle or transport.close())


class Pages(Protocol):
    """Which pages there are, by the names of their sessions, see `page.Pages`."""

    def opened(self, session: str) -> AbstractContextManager: ...

    def admit(self, session: str) -> str: ...


class Door:
    """ASGI, around the page. inputs: of each event by its number, the kinds of its components, see `TYPES`."""

    def __init__(
        self,
        app: Callable,
        inputs: Mapping[int, list[str]],
        pages: Pages,
        local: bool = True,
        auth: Auth | None = None,
    ):
        self.app, self.inputs, self.pages, self.local, self.auth = app, inputs, pages, local, auth or Auth()
        self.wrong: dict[str, list[float]] = {}  # by their addresses, when who came with a wrong password
        self.held = 0  # bytes of events that are still arriving

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":  # the server's start and end
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})

        async def sealed(message: dict) -> None:
            if message["type"] == "http.response.start":
                seals = [(name.lower().encode(), value.encode()) for name, value in SEALS.items()]
                message = message | {"headers": [*message.get("headers", ()), *seals]}
            await send(message)

        request, path, listens = Request(scope, receive), scope["path"], nullcontext()
        try:
            answer = self.ask(request, path)
            if answer is None:
                kept = [(name, value) for name, value in scope["headers"] if name in PASSED]
                scope = scope | {"headers": kept}  # gradio believes others, as of where it is
                if path == JOIN:
                    receive = once(self.plain(await self.read(request)), receive)
                elif heard := HEARS.fullmatch(path):
                    listens = self.pages.opened(heard[1] or request.query_params.get("session_hash", ""))
                elif path == "/":
                    scope["query_string"] = b""  # where gradio finds a link to a state that it saved
        except Refused as why:
            status, text = why.args
            headers = {"Connection": "close"}  # and who sends on, or slowly, sends in vain
            if status == 401 and self.auth.password:
                headers["WWW-Authenticate"] = "Basic"
            answer = PlainTextResponse(text, status, headers)
        with listens:
            await (answer or self.app)(scope, receive, sealed)

    def ask(self, request: Request, path: str) -> Response | None:
        """Who is it, and what for? The answer to a link; else None, to go on. Raises Refused."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.local and re.sub(r":\d*$", "", host) not in LOCAL:  # a foreign name that leads to this computer
            raise Refused(403, "this page is for this computer only")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "another page may not use this one")
        token = request.query_params.get("token", "")
        if request.method == "GET" and path == "/" and self.auth.link and same(token, self.auth.link):
            self.auth = self.auth._replace(link="", cookie=secrets.token_urlsafe())
            answer = RedirectResponse("/", 303)
            answer.set_cookie("emilie", self.auth.cookie, httponly=True, samesite="lax")
            return answer
        if not self.admits(request):
            raise Refused(401, self.auth.asks)
        allowed = {"GET": READ, "HEAD": re.compile("/"), "POST": WRITE}.get(request.method)
        if not allowed or not allowed.fullmatch(path) or ".." in path:
            raise Refused(404, "there is nothing here")
        return None

    def admits(self, request: Request) -> bool:
        """Whether somebody may come in; from one address few wrong passwords are heard. Raises Refused."""
        now, address = time.monotonic(), request.client.host if request.client else ""
        lately = [then for then in self.wrong.get(address, ()) if then > now - WHILE]
        if len(lately) >= WRONG:
            raise Refused(429, "too many wrong passwords: wait a minute")
        admitted = self.auth.admits(request)
        if not admitted and self.auth.password and request.headers.get("authorization"):
            if len(self.wrong) > 1000:
                self.wrong.clear()
            self.wrong[address] = [*lately, now]
        return admitted

    async def read(self, request: Request) -> bytes:
        """An event's body. Raises Refused: it is too long, too slow, or too many are arriving."""
        body = bytearray()
        try:
            with anyio.fail_after(PATIENCE):
                async for chunk in request.stream():
                    body += chunk
                    self.held += len(chunk)
                    if len(body) > EVENT:
                        raise Refused(413, f"more than {EVENT >> 20} MB")
                    if self.held > HELD:
                        raise Refused(503, "too much is arriving: try again later")
        except TimeoutError:
            raise Refused(408, f"it took more than {PATIENCE:.0f} s to arrive") from None
        finally:
            self.held -= len(body)
        return bytes(body)

    def plain(self, body: bytes) -> bytes:
        """An event written anew: its number, its page, and values of its inputs' types. Raises Refused."""
        try:
            if sum(map(body.count, b"[{,")) > PARTS:
                raise ValueError
            event = json.loads(body, parse_constant=lambda word: math.inf)
            number, values, more = event["fn_index"], event["data"], event.get("event_data")
            kinds = self.inputs[number] if type(number) is int else None  # which has no length
            fits = (
                re.fullmatch(r"[\w-]{1,64}", event["session_hash"])
                and type(values) is list
                and len(values) == len(kinds)
                and all(type(value) in TYPES[kind] for kind, value in zip(kinds, values))
                and all(abs(value) < NUMBER for value in values if type(value) in (int, float))
            )
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            fits = False
        if not fits:
            raise Refused(422, "no event of this page")
        if why := self.pages.admit(event["session_hash"]):
            raise Refused(503, why)
        kept = {"fn_index": number, "session_hash": event["session_hash"], "data": values}
        kept["event_data"] = {"asked": time.time()}
        if type(more) is dict and shows("[0-9]{1,6}", more.get("state")):  # a click on the tree of edits
            kept["event_data"] |= {"state": str(more["state"])}
            if shows("|".join(CHANGES), more.get("change")) and shows("[0-9]{1,4}([.][0-9]{1,4})?", more.get("value")):
                kept["event_data"] |= {"change": more["change"], "value": str(more["value"])}  # of the stack
        return json.dumps(kept).encode()


def shows(pattern: str, value: object) -> bool:
    """Whether a text or a number looks so."""
    return type(value) in (str, int, float) and bool(re.fullmatch(pattern, str(value)))


def once(body: bytes, receive: Callable) -> Callable:
    """An ASGI `receive` that gives this body, and then what the connection gives."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> dict:
        return messages.pop() if messages else await receive()

    return given


def routes(visitors: Mapping) -> list[Route]:
    """The page's ways to send and fetch files, and to stop an edit; visitors: by their keys."""

    def who(request: Request):
        found = visitors.get(request.path_params["key"])
        if found is None:
            raise HTTPException(404, "nobody has this key: load the page anew")
        return found

    async def upload(request: Request) -> Response:
        """A file from a visitor: it lies here, for this user's eyes only, until it is opened."""
        visitor, name, size = who(request), request.query_params.get("name", ""), 0
        visitor.uploaded = mine = (name, None)
        folder = tempfile.TemporaryDirectory(prefix="emilie-")
        path = Path(folder.name) / ("upload" + ".canvas" * name.endswith((".canvas", ".safetensors")))
        try:
            with open(path, "wb") as file:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > UPLOAD:
                        raise HTTPException(413, f"more than {UPLOAD >> 20} MB")
                    if visitor.uploaded is not mine:
                        raise HTTPException(409, "another file came")
                    if shutil.disk_usage(folder.name).free < ROOM:
                        raise HTTPException(507, "there is no room for it here")
                    file.write(chunk)
        except OSError as error:
            raise HTTPException(507, "there is no room for it here") from error
        visitor.uploaded = name, folder  # which goes when it is read, when nobody has it any more, or at the end
        return Response(status_code=204)

    async def save(request: Request) -> Response:
        return Made(who(request), request.path_params["what"], turn)

    async def stop(request: Request) -> Response:
        who(request).stop()
        return Response(status_code=204)

    turn = asyncio.Semaphore(MAKERS)
    return [
        Route("/open/{key}", upload, methods=["POST"]),
        Route("/stop/{key}", stop, methods=["POST"]),
        Route("/save/{key}/{what}", save),
    ]


class Made(Response):
    """A visitor's file, made in its turn; a visitor has one at a time, which is in memory until it is sent."""

    def __init__(self, visitor, what: str, turn: asyncio.Semaphore):
        self.visitor, self.what, self.turn = visitor, what, turn

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async with self.visitor.saving:
            async with self.turn:
                gone = await Request(scope, receive).is_disconnected()
                made = None if gone else await run_in_threadpool(self.visitor.file, self.what)
            if made is None:
                answer: Response = PlainTextResponse("there is nothing to save", 404)
            else:
                headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(made[0])}"}
                answer = Response(made[1], 200, headers | {"Cache-Control": "no-store"}, "application/octet-stream")
            await answer(scope, receive, send)
