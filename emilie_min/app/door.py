"""The door of the studio: which requests reach the page at all, from whom, and what an event may bring.

Gradio takes a file that an event names, {"path": ..., "meta": ...}, for one of its own, and on a mounted page it does
not ask whose it is. So none gets there: of an event only plain values of its inputs' types pass, all of gradio's ways
to send and fetch files are closed, and the page has its own, `routes`. They want the visitor's key, which is told to
its own page and to nobody else.
"""

import base64
import json
import math
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from .layers import CHANGES

WRONG, WHILE = 10, 60.0  # passwords that an address may have wrong in so many seconds
EVENT, UPLOAD = 2**25, 2**28  # bytes that an event and an uploaded file may have
LOCAL = ("127.0.0.1", "localhost", "[::1]")
JOIN = "/gradio_api/queue/join"
READ = re.compile(
    r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/[\w@-][\w.@/-]*|/save/[\w-]+/[a-z]+"
    r"|/config|/gradio_api/(info|startup-events|queue/data|heartbeat/[\w-]+)"
)
WRITE = re.compile(rf"{JOIN}|/(open|stop)/[\w-]+")
TYPES = {  # of what an event may bring for each kind of component; a State stays on the server
    "textbox": (str, type(None)),
    "slider": (int, float),
    "number": (int, float, type(None)),
    "radio": (str,),
    "checkbox": (bool,),
    "dataset": (int,),
    "state": (type(None),),
}


class Refused(Exception):
    """A request that goes no further: HTTP status and why."""


class Auth(NamedTuple):
    """Who may come in. A link works once and leaves its cookie in the browser that used it."""

    password: str = ""  # USER:PASSWORD
    link: str = ""
    cookie: str = ""

    def admits(self, request: Request) -> bool:
        basic = "Basic " + base64.b64encode(self.password.encode()).decode() if self.password else ""
        given = request.headers.get("authorization", ""), request.cookies.get("emilie", "")
        return not any(self) or any(want and same(has, want) for has, want in zip(given, (basic, self.cookie)))


def same(a: str, b: str) -> bool:
    return secrets.compare_digest(a.encode(), b.encode())


class Door:
    """ASGI, around the page. inputs: of each event by its number, the kinds of its components, see `TYPES`."""

    def __init__(self, app: Callable, inputs: Mapping[int, list[str]], local: bool = True, auth: Auth | None = None):
        self.app, self.inputs, self.local, self.auth = app, inputs, local, auth or Auth()
        self.wrong: dict[str, list[float]] = {}  # by their addresses, when who came with a wrong password

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":  # the server's start and end
            return await self.app(scope, receive, send)
        request, path = Request(scope, receive), scope["path"]
        try:
            answer = self.ask(request, path)
            if answer is None and path == JOIN:
                receive = once(self.plain(await read(request, EVENT)), receive)
            elif answer is None and path == "/":
                scope = scope | {"query_string": b""}  # where gradio finds a link to a state that it saved
        except Refused as why:
            status, text = why.args
            headers = {"WWW-Authenticate": "Basic"} if status == 401 and self.auth.password else None
            answer = PlainTextResponse(text, status, headers)
        await (answer or self.app)(scope, receive, send)

    def ask(self, request: Request, path: str) -> Response | None:
        """Who is it, and what for? The answer to a link; else None, to go on. Raises Refused."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.local and re.sub(r":\d*$", "", host) not in LOCAL:  # a foreign name that leads to this computer
            raise Refused(403, "this page is for this computer only")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(403, "another page may not use this one")
        token = request.query_params.get("token", "")
        if path == "/" and self.auth.link and same(token, self.auth.link):
            self.auth = self.auth._replace(link="", cookie=secrets.token_urlsafe())
            answer = RedirectResponse("/", 303)
            answer.set_cookie("emilie", self.auth.cookie, httponly=True, samesite="strict")
            return answer
        if not self.admits(request):
            raise Refused(401, "user and password, please" if self.auth.password else "open the link that was printed")
        allowed = {"GET": READ, "HEAD": READ, "POST": WRITE}.get(request.method)
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
        if not admitted and request.headers.get("authorization"):
            if len(self.wrong) > 1000:
                self.wrong.clear()
            self.wrong[address] = [*lately, now]
        return admitted

    def plain(self, body: bytes) -> bytes:
        """An event written anew: its number, its page, and values of its inputs' types. Raises Refused."""
        try:
            event = json.loads(body, parse_constant=lambda word: math.inf)
            number, values = event["fn_index"], event["data"]
            kinds = self.inputs[number] if type(number) is int else None
            fits = (
                kinds is not None
                and re.fullmatch(r"[\w-]{1,64}", event["session_hash"])
                and type(values) is list
                and len(values) == len(kinds)
                and all(type(value) in TYPES[kind] for kind, value in zip(kinds, values))
                and all(math.isfinite(value) for value in values if type(value) is float)
            )
        except (ValueError, TypeError, LookupError, RecursionError):
            fits = False
        if not fits:
            raise Refused(422, "no event of this page")
        kept = {"fn_index": number, "session_hash": event["session_hash"], "data": values}
        if type(event.get("trigger_id")) is int:
            kept["trigger_id"] = event["trigger_id"]
        kept["event_data"] = {"asked": time.time()}
        more = event.get("event_data")
        if type(more) is dict and re.fullmatch("[0-9]{1,6}", str(more.get("state"))):  # a click on the tree of edits
            kept["event_data"] |= {"state": str(more["state"])}
            if more.get("change") in CHANGES and re.fullmatch("[0-9]{1,4}([.][0-9]{1,4})?", str(more.get("value"))):
                kept["event_data"] |= {"change": more["change"], "value": str(more["value"])}  # of the stack
        return json.dumps(kept).encode()


async def read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(413, f"more than {limit >> 20} MB")
    return bytes(body)


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
        visitor.uploaded = name, None
        folder = tempfile.TemporaryDirectory(prefix="emilie-")
        path = Path(folder.name) / ("upload" + ".canvas" * name.endswith((".canvas", ".safetensors")))
        with open(path, "wb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > UPLOAD:
                    folder.cleanup()
                    return PlainTextResponse(f"more than {UPLOAD >> 20} MB", 413)
                file.write(chunk)
        visitor.uploaded = name, folder  # which goes when it is read, when the visitor goes, or at the end
        return Response(status_code=204)

    async def save(request: Request) -> Response:
        made = await run_in_threadpool(who(request).file, request.path_params["what"])
        if made is None:
            raise HTTPException(404, "there is nothing to save")
        name, data = made
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(name)}", "Cache-Control": "no-store"}
        return Response(data, 200, headers, "application/octet-stream")

    async def stop(request: Request) -> Response:
        who(request).stop()
        return Response(status_code=204)

    return [
        Route("/open/{key}", upload, methods=["POST"]),
        Route("/stop/{key}", stop, methods=["POST"]),
        Route("/save/{key}/{what}", save),
    ]
