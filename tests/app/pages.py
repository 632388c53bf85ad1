"""The studio's page at work in this process, and a visitor who writes the requests by hand."""

import base64
import http.client
import itertools
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from emilie_min.app import studio

SESSIONS = itertools.count()


@contextmanager
def served(editor, **more):
    """The page, with its `port` and `url`."""
    page, server = studio.serve(editor, **more)
    listener = studio.listen(port=0)
    page.port = listener.getsockname()[1]
    page.url, page.door = f"http://127.0.0.1:{page.port}/", server.config.app
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield page
    server.should_exit = True
    thread.join(30)


class Caller:
    """Requests as they are written: no path is tidied up, no type is checked."""

    def __init__(self, page, password: str = ""):
        self.page, self.session = page, f"caller{next(SESSIONS)}"
        self.headers = {"Authorization": "Basic " + base64.b64encode(password.encode()).decode()} if password else {}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, bytes, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.page.port, timeout=60)
        connection.request(method, path, body, self.headers | {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        try:
            endless = "event-stream" in answer.headers.get("content-type", "")
            return answer.status, b"" if endless else answer.read(), dict(answer.headers)
        finally:
            connection.close()

    @contextmanager
    def slow(self, method: str, path: str):
        """The connection of a request whose body comes in chunks, which are sent by hand."""
        with socket.create_connection(("127.0.0.1", self.page.port), 60) as line:
            line.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            yield line

    def leave(self, method: str, path: str) -> None:
        """Ask, and be gone before the answer."""
        with socket.create_connection(("127.0.0.1", self.page.port), 60) as line:
            line.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            line.shutdown(socket.SHUT_WR)

    def join(self, number: int, data: list, **more) -> tuple[int, bytes]:
        """Put an event into the queue."""
        event = {"fn_index": number, "session_hash": self.session, "data": data} | more
        body = json.dumps(event).encode()
        return self.ask("POST", "/gradio_api/queue/join", body, Content_Type="application/json")[:2]

    def open_stream(self, path: str = "") -> Iterator[bytes]:
        """Lines that the page is sent; `close` leaves the page."""
        connection = http.client.HTTPConnection("127.0.0.1", self.page.port, timeout=60)
        connection.request("GET", path or f"/gradio_api/queue/data?session_hash={self.session}", headers=self.headers)
        answer = connection.getresponse()
        assert answer.status == 200
        try:
            yield from answer
        finally:
            answer.close()
            connection.close()

    def messages(self) -> Iterator[dict]:
        for line in self.open_stream():
            if line.startswith(b"data:"):
                yield json.loads(line[5:])

    def results(self) -> list[dict]:
        """What this page's events gave, once all are through."""
        return [message for message in self.messages() if message["msg"] in ("process_generating", "process_completed")]

    def do(self, number: int, data: list, **more) -> str:
        """An event from beginning to end, as text."""
        status, body = self.join(number, data, **more)
        assert status == 200, body
        return json.dumps(self.results())

    def enter(self) -> "Caller":
        """Load the page: a new scene, and the key of this visitor."""
        self.key = re.search(r"data-key=[^\w-]+([\w-]+)", self.do(0, [None]))[1]
        return self

    @property
    def visitor(self):
        return self.page.visitors[self.key]

    def edit(
        self, text, paint="", keep=False, crop=False, text_scale=1.5, image_scale=1.0, steps=2, seed=None,
        gate="anchor", no="", part=1,
    ) -> list:  # fmt: skip
        """The values of an edit."""
        return [None, text, paint, keep, crop, text_scale, image_scale, steps, seed, gate, no, part]

    def insert(self, caption="", redrawn=1, keep=False) -> list:
        """The values of an insertion."""
        return [None, caption, redrawn, keep, *self.edit("")[5:-1]]

    def arrive(self, number: int, name: str, content: bytes) -> str:
        """Send a file and the event that takes it for an inset or its mask."""
        assert self.upload(name, content) == 204
        return self.do(number, [None, ""])

    def upload(self, name: str, content: bytes) -> int:
        return self.ask("POST", f"/open/{self.key}?name={quote(name, safe='')}", content)[0]
