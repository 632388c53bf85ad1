"""What an attacker may write to the studio: real requests, of every event, every input and every route."""

import asyncio
import base64
import importlib.util
import io
import json
import re
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import emilie_min
from emilie_min.app import door
from emilie_min.canvas.canvas import Canvas
from emilie_min.toy import world

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="not installed: gradio"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.*"),
]
LOAD, EDIT, SCENE, OPENED, UNDO, REDO, TREE, STACK, STOP, EXAMPLES = range(10)  # the page's events by their numbers
INSET, INSET_MASK, PLACES, AWAY, INSERT = range(14, 19)
EDIT_BY_NAME, INSERT_BY_NAME, GO_BY_NAME = 21, 24, 27


@pytest.fixture(scope="module")
def editor():
    editor = emilie_min.load(device="cpu")
    editor.config.sampling.steps = 2
    return editor


@pytest.fixture(scope="module")
def page(editor):
    from pages import served

    with served(editor) as page:
        yield page


@pytest.fixture
def caller(page):
    from pages import Caller

    return Caller(page).enter()


@pytest.fixture
def secret(tmp_path) -> Path:
    """A private picture: to be opened is to be read."""
    path = tmp_path / "secret.png"
    Image.new("RGB", (64, 64), (12, 34, 56)).save(path)
    return path


def spellings(path: Path) -> list:
    """How an event may name a file."""
    link = path.parent / "link"
    link.symlink_to(path)
    meta = {"_type": "gradio.FileData"}
    named = [
        {"path": str(path), "meta": meta},
        {"path": str(link), "meta": meta},
        {"path": f"file://{path}", "meta": meta},
        {"path": "", "url": f"file://{path}", "meta": meta},
        {"path": "x", "url": f"http://127.0.0.1:1/{path}", "meta": meta},
        {"path": "http://127.0.0.1:1/x", "meta": meta},
        {"path": "data:image/png;base64,AAAA", "meta": meta},
        {"path": str(path)},
        {"url": str(path), "meta": meta},
    ]
    one = named[0]
    nested = [[one], [[one]], {"a": one}, {"a": [{"b": one}]}, {"__type__": "update", "value": one}, {"value": one}]
    return [*named, *nested]


def test_no_event_takes_a_file_in_any_input(page, caller, secret):
    kinds = {"textbox": "make it night", "slider": 1, "number": 1, "checkbox": False, "dataset": 0, "radio": "anchor"}
    files, tried = spellings(secret), set()
    for number, fn in page.fns.items():
        names = [block.get_block_name() for block in fn.inputs]
        values = [kinds.get(name) for name in names]
        for place, name in enumerate(names):
            for file in files if name not in tried else files[:1]:
                bad = [*values[:place], file, *values[place + 1 :]]
                assert caller.join(number, bad)[0] == 422, (number, place, file)
            tried.add(name)
    assert tried == {*kinds, "state"}
    assert len(caller.visitor.canvas.states) == 1


def test_what_else_an_event_brings_goes_no_further(caller, secret):
    for more in (
        {"path": str(secret), "meta": {"_type": "gradio.FileData"}},
        {"state": {"path": str(secret)}},
        [1],
        "x",
    ):
        told = caller.do(TREE, [None], event_data=more)
        assert "a click says where" in told and str(secret) not in told
    assert "At 0" in caller.do(TREE, [None], event_data={"state": "0", "path": str(secret)})
    told = caller.do(SCENE, [None], event_id=str(secret), simple_format=True, batched=True, oauth_token="x", request={})
    assert "of the small world" in told


def scaled(text: str) -> bytes:
    """An edit whose text scale is written so."""
    values = f'[null, "x", "", false, false, {text}, 1, 2, null, "anchor", "", 1]'
    return f'{{"fn_index": {EDIT}, "session_hash": "a", "data": {values}}}'.encode()


BODIES = {
    "no JSON": b"data=1",
    "a list": b"[]",
    "nested beyond measure": b"[" * 100_000,
    "no data": b'{"fn_index": 4, "session_hash": "a"}',
    "data twice": b'{"fn_index": 4, "session_hash": "a", "data": [null], "data": [{"path": "/etc/passwd"}]}',
    "too much data": b'{"fn_index": 4, "session_hash": "a", "data": [null, null]}',
    "an unknown event": b'{"fn_index": 99, "session_hash": "a", "data": [null]}',
    "an event that is true": scaled("1").replace(b": %d" % EDIT, b": true"),
    "an event by its name": b'{"fn_index": "4", "session_hash": "a", "data": [null]}',
    "no page": b'{"fn_index": 4, "data": [null]}',
    "a page that is a path": b'{"fn_index": 4, "session_hash": "../a", "data": [null]}',
    "a page that is a list": b'{"fn_index": 4, "session_hash": ["a"], "data": [null]}',
    "not a number": scaled("NaN"),
    "infinite": scaled("1e999"),
    "a text": scaled('"1"'),
    "a number": scaled("1").replace(b'"x"', b"1"),
    "no list of data": b'{"fn_index": %d, "session_hash": "a", "data": {}}' % STOP,
    "no UTF-8": b"\xff\xfe\x00",
    "of many parts": b'{"fn_index": 4, "session_hash": "a", "data": [null], "x": [%s0]}' % (b"0," * 10_000),
    "a large number": b'{"fn_index": 27, "session_hash": "a", "data": [null, 1%s]}' % (b"0" * 20),
    "a large negative number": b'{"fn_index": 27, "session_hash": "a", "data": [null, -1e20]}',
    "a body that is a text": b'"fn_index"',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_event(name, caller):
    for path in ("/gradio_api/queue/join", "/gradio_api/queue/%6aoin", "/gradio_api/queue/join?x=1"):
        status, told, _ = caller.ask("POST", path, BODIES[name], Content_Type="application/json")
        assert status == 422 and told == b"no event of this page"


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ({"state": 3}, {"state": "3"}),
        ({"state": "3", "change": "hide", "value": 0.5}, {"state": "3", "change": "hide", "value": "0.5"}),
        ({"state": "3", "change": "hide", "value": "0.5; x"}, {"state": "3"}),
        ({"state": "3", "change": "hide"}, {"state": "3"}),
        ({"state": "3", "change": "forget", "value": "1"}, {"state": "3"}),
        ({"state": "3", "change": ["hide"], "value": "1"}, {"state": "3"}),
        ({"state": "-3"}, {}),
        ({"state": ["3"], "change": "hide", "value": "1"}, {}),
        ([{"state": "3"}], {}),
    ],
)
def test_what_a_click_says_is_read_by_its_words(more, kept):
    event = {"fn_index": 0, "session_hash": "a", "data": [], "event_data": more}
    plain = door.Door(lambda *_: None, {0: []}, SimpleNamespace(admit=lambda page: None)).plain
    told = json.loads(plain(json.dumps(event).encode()))
    assert told.keys() == {"fn_index", "session_hash", "data", "event_data"}
    assert told["event_data"].pop("asked") <= time.time() and told["event_data"] == kept


def test_a_value_out_of_range_is_told_and_no_crash(caller, capfd):
    edit = caller.edit("make it night")
    for place, value, told in (
        (7, 0, "steps must be"),
        (7, 1001, "steps must be"),
        (9, "x" * 999, "unknown gate"),
    ):
        bad = [*edit[:place], value, *edit[place + 1 :]]
        for number, values in ((EDIT, bad), (EDIT_BY_NAME, bad[:-1])):
            assert told in caller.do(number, values) and len(caller.visitor.canvas.states) == 1
    assert "state must be a whole number" in caller.do(GO_BY_NAME, [None, None])
    assert "take must be a whole number" in caller.do(INSERT_BY_NAME, [None, None, "", 1, False, *edit[5:-1]])
    for number in (-1, 99, 10**18):
        assert '"success": true' in caller.do(EXAMPLES, [None, number])
    (first, *_) = caller.visitor.suggestions()
    assert first in caller.do(EXAMPLES, [None, 0])
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_spoiled_there_is_an_event(page, caller):
    assert page.fns[STOP].inputs == []
    assert caller.ask("POST", "/gradio_api/queue/join", scaled("1"), Content_Type="application/json")[0] == 200


def test_an_event_before_the_page_is_loaded_is_told(page):
    from pages import Caller

    stranger = Caller(page)
    assert "there is no picture yet" in stranger.do(EDIT, stranger.edit("make it night"))


CLOSED = """
GET /gradio_api/file={secret} | GET /file={secret} | GET /gradio_api/file/{secret} | HEAD /gradio_api/file={secret}
GET /gradio_api/file=file://{secret} | GET /gradio_api/proxy=http://127.0.0.1:1/x | GET /proxy=file://{secret}
GET /static/../../../../../../../..{secret} | GET /static/%2e%2e/%2e%2e{secret} | GET /static//{secret}
GET /static/{secret} | GET /assets/..%2f..%2f..%2f..%2f..%2f..{secret} | GET /assets/..{secret}
GET /svelte/..{secret} | GET //{secret} | GET {secret} | GET /save/../{secret} | GET /save/x/..%2f{secret}
GET /static/a/..{secret} | GET /assets/a/../../x
GET /theme.css/..{secret} | GET /custom_component/0/server/x/y
GET /gradio_api/custom_component/0/client/component/..{secret}
GET /gradio_api/openapi.json | GET /gradio_api/deep_link?session_hash=x | GET /gradio_api/runs
GET /gradio_api/queue/status | GET /monitoring | GET /docs | GET /gradio_api/stream/x/0/0/playlist.m3u8
GET /gradio_api/stream/x/0/0/playlist-file | GET /gradio_api/upload_progress?upload_id=x | GET /gradio_api/call/edit/x
POST /gradio_api/call/edit | POST /gradio_api/run/predict | POST /gradio_api/api/predict | POST /run/predict
POST /gradio_api/upload | POST /upload | POST /gradio_api/component_server | POST /gradio_api/process_recording
POST /gradio_api/reset | POST /gradio_api/cancel | POST /gradio_api/vibe-edit | POST /gradio_api/stream/x
POST /login | PUT / | DELETE / | OPTIONS / | POST / | GET /gradio_api/queue/join | POST /gradio_api/queue/data
PATCH /gradio_api/queue/join | POST /gradio_api//queue/join
"""


def test_every_other_way_is_closed(caller, secret, tmp_path):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../../../evil.png"\r\n\r\nevil\r\n--x--\r\n'
    )
    ways = [way.strip() for line in CLOSED.strip().splitlines() for way in line.split("|")]
    for way in ways:
        method, path = way.format(secret=secret).split()
        kind = "multipart/form-data; boundary=x" if "upload" in path else "application/json"
        status, answer, _ = caller.ask(method, path, body if method == "POST" else None, Content_Type=kind)
        assert (status, answer if method != "HEAD" else b"") == (404, b"there is nothing here" * (method != "HEAD")), (
            way
        )
    assert len(ways) > 43


def routes(app) -> list[str]:
    """The paths of an app and of what is mounted on it, with x in the place of each parameter."""
    inner = [getattr(r, "original_router", r) for r in app.routes]  # a router that was put into another
    below = [path for r in inner if getattr(r, "routes", None) for path in routes(r)]
    return [re.sub(r"{.*?}", "x", r.path) for r in inner if hasattr(r, "endpoint")] + below


def test_no_way_of_the_installed_gradio_is_open_by_oversight(page, caller):
    known = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/assets/x", "/static/x", "/svelte/x"}
    known |= {f"/gradio_api/{name}" for name in ("info", "queue/data", "heartbeat/x")} | {"/save/x/x"}
    paths = set(routes(page.door.app))
    assert known | {"/gradio_api/queue/join", "/open/x", "/stop/x", "/gradio_api/startup-events"} < paths
    for path in paths - known | {f"/gradio_api{path}" for path in paths} | {f"/{path}" for path in paths}:
        assert caller.ask("GET", path)[1] == b"there is nothing here", path
    for path in paths - {"/gradio_api/queue/join", "/open/x", "/stop/x"}:
        assert caller.ask("POST", path, b"{}")[1] == b"there is nothing here", path
    assert all(caller.ask("HEAD", path)[0] == 404 for path in known - {"/"})


def test_every_answer_is_sealed_and_a_refusal_is_the_last(caller):
    for method, path, status in (
        ("GET", "/", 200),
        ("GET", f"/gradio_api/queue/data?session_hash={caller.session}", 200),
        ("GET", "/x", 404),
        ("POST", "/gradio_api/queue/join", 422),
    ):
        got, _, headers = caller.ask(method, path, b"{}" if method == "POST" else None)
        assert got == status and headers.get("connection") == (None if status == 200 else "close")
        assert headers["x-frame-options"] == "DENY" and "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"
        assert "server" not in headers
    config = caller.ask("GET", "/config")[1]
    assert b'"show_error":false' in config and str(Path.home()).encode() not in config


def test_what_a_request_says_of_where_it_goes_is_not_believed(caller):
    for name in ("X_Forwarded_Host", "X_Gradio_Server"):
        for path in ("/", "/config"):
            status, answer, _ = caller.ask("GET", path, **{name: "http://evil.example"})
            assert status == 200 and b"evil.example" not in answer


def test_nothing_but_http_gets_through(page):
    sent, called = [], []

    async def ask(scope: dict) -> None:
        async def send(message):
            sent.append(message["type"])

        await door.Door(lambda *_: called.append(1), {}, page.door.pages)(scope, None, send)

    asyncio.run(ask({"type": "websocket", "path": "/", "headers": []}))
    assert sent == ["websocket.close"] and not called


def test_a_link_to_a_saved_state_is_not_followed(caller):
    assert b'"deep_link_state":"none"' in caller.ask("GET", "/?deep_link=../../x")[1]


def test_uploads(caller, tmp_path, monkeypatch):
    monkeypatch.setattr(door.tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    out = io.BytesIO()
    world.render(world.scene(9)).save(out, "PNG")
    for name in ("a.png", "../../a.png", "/etc/passwd", "..\\a", "a\0b", "a" * 5000, "\x1b[31m", "<b>", ""):
        assert caller.upload(name, out.getvalue()) == 204
        (folder,) = (tmp_path / "temp").iterdir()
        assert folder.stat().st_mode & 0o77 == 0 and len(list(folder.iterdir())) == 1
        told = caller.do(OPENED, [None])
        assert "is open" in told and "\\u001b" not in told and "/temp/" not in told
        assert np.array_equal(caller.visitor.canvas.image, world.render(world.scene(9)))
        assert list((tmp_path / "temp").iterdir()) == []
    canvas = caller.visitor.canvas
    for name, content in (
        ("a.png", b""),
        ("a.png", out.getvalue()[:100]),
        ("a.safetensors", b"\xff" * 99),
        ("a", b"{}" * 9),
    ):
        assert caller.upload(name, content) == 204
        assert "cannot be read" in caller.do(OPENED, [None])
    assert "did not arrive" in caller.do(OPENED, [None])  # nothing was sent before
    monkeypatch.setattr(door, "UPLOAD", 1000)
    assert caller.upload("large.png", b"x" * 2000) == 413
    assert "large.png did not arrive" in caller.do(OPENED, [None])
    assert list((tmp_path / "temp").iterdir()) == [] and caller.visitor.canvas is canvas
    monkeypatch.undo()
    monkeypatch.setattr(door.tempfile, "tempdir", str(tmp_path / "temp"))
    for free in (lambda _: SimpleNamespace(free=door.ROOM - 1), lambda _: 1 / 0, lambda _: open("/none")):
        monkeypatch.setattr(door.shutil, "disk_usage", free)
        assert caller.upload("a.png", out.getvalue()) in (500, 507)
        assert "did not arrive" in caller.do(OPENED, [None]) and list((tmp_path / "temp").iterdir()) == []


def test_of_two_uploads_at_once_the_later_one_counts(page, caller):
    out = io.BytesIO()
    world.render(world.scene(9)).save(out, "PNG")
    with caller.slow("POST", f"/open/{caller.key}?name=a.png") as line:
        line.sendall(b"1\r\nx\r\n")
        until(lambda: caller.visitor.uploaded[0] == "a.png")
        assert caller.upload("b.png", out.getvalue()) == 204
        line.sendall(b"1\r\nx\r\n")
        assert b" 409 " in line.recv(1000)
    assert "b.png is open" in caller.do(OPENED, [None])


def test_an_inset_goes_through_the_same_door(page, caller, secret, tmp_path, monkeypatch):
    from pages import Caller

    monkeypatch.setattr(door.tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    assert "picture, then its mask" in caller.arrive(INSET_MASK, "mask.png", secret.read_bytes())
    for event in (INSET, INSET_MASK):
        assert "did not arrive" in caller.do(event, [None, ""])  # nothing was sent
        assert caller.join(event, [None, {"path": str(secret), "meta": {"_type": "gradio.FileData"}}])[0] == 422
        assert caller.join(event, [None, 1])[0] == 422
    assert "no inset yet" in caller.do(PLACES, [None, str(secret), ""])  # a caption is no path
    assert "no place is proposed" in caller.do(INSERT, caller.insert(), event_data={"state": "0"})
    assert "a click says where" in caller.do(INSERT, caller.insert(), event_data={"state": {"path": str(secret)}})
    told = caller.arrive(INSET, "../kite.png", circle())
    assert "kite.png is the inset" in told and "a red circle" in told and "/temp/" not in told
    assert list((tmp_path / "temp").iterdir()) == []
    inset = caller.visitor.inserting.inset
    for name, content, why in (
        ("a.png", b"", "cannot be read"),
        ("b.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "b.eps cannot be read as a picture"),
        ("c.canvas", b"\xff" * 99, "c.canvas cannot be read as a picture"),
    ):
        told = caller.arrive(INSET, name, content)
        assert why in told and "/temp/" not in told and caller.visitor.inserting.inset is inset
    assert "64x64 px and the picture 32x32" in caller.arrive(INSET_MASK, "m.png", secret.read_bytes())
    other = Caller(page).enter()
    assert "no inset yet" in other.do(PLACES, [None, "", ""]) and other.visitor.inserting.inset is None
    assert "no place is proposed" in other.do(INSERT, other.insert(), event_data={"state": "0"})
    assert "It shows" in caller.do(PLACES, [None, "", ""])
    assert "there is no proposal 100000" in caller.do(INSERT, caller.insert(), event_data={"state": "99999"})
    assert "Edit 1: add a red circle" in caller.do(INSERT, caller.insert(), event_data={"state": "0"})
    assert "No inset" in caller.do(AWAY, [None]) and len(caller.visitor.canvas.states) == 2


def circle() -> bytes:
    scene, out = world.Scene("sand", "day", (world.Object("circle", "red", "top left"),)), io.BytesIO()
    world.render(scene).crop((0, 0, 32, 32)).save(out, "PNG")
    return out.getvalue()


def test_an_upload_starts_no_program(caller, monkeypatch):
    from PIL import EpsImagePlugin

    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **more: called.append(args))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    assert caller.upload("photo.png", eps) == 204
    assert "photo.png cannot be read as a picture" in caller.do(OPENED, [None]) and not called


def test_one_visitor_never_sees_anothers(page, caller):
    from pages import Caller

    other = Caller(page).enter()
    assert other.key != caller.key and len(other.key) > 40
    for one in (caller, other):
        status, data, headers = one.ask("GET", f"/save/{one.key}/picture")
        assert status == 200 and headers["cache-control"] == "no-store"
        assert np.array_equal(Image.open(io.BytesIO(data)), one.visitor.canvas.image)
    for method, path in (
        ("POST", "/open/{}"),
        ("POST", "/stop/{}"),
        ("GET", "/save/{}/picture"),
        ("GET", "/save/{}/canvas"),
    ):
        for key in ("x", other.key[:-1], other.key.swapcase(), other.session):
            assert caller.ask(method, path.format(key), b"x" if method == "POST" else None)[0] == 404
    assert caller.ask("GET", f"/save/{caller.key}/key")[0] == 404
    assert other.upload("mine.png", b"x") == 204
    assert "did not arrive" in caller.do(OPENED, [None])  # what another sent is not there to open
    assert other.key not in caller.do(UNDO, [None])


def test_a_mask_that_unpacks_to_more_than_the_picture(caller):
    out = io.BytesIO()
    Image.new("RGBA", (9000, 1)).save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()[:60]).decode()  # who unpacks it finds it cut short
    assert "same size" in caller.do(EDIT, caller.edit("make it night", url))
    for bad in ("/etc/passwd", "file:///etc/passwd", "data:image/png;base64,/etc/passwd"):
        assert "paint it again" in caller.do(EDIT, caller.edit("make it night", bad))
    assert "too long" in caller.do(EDIT, caller.edit("make it night " * 1000))
    assert len(caller.visitor.canvas.states) == 1


def test_the_limits_are_those_of_a_small_server():
    from emilie_min.app import page, visitor

    assert door.EVENT <= 2**26 and door.UPLOAD <= 2**29 and door.HELD <= 2**30 and door.ROOM <= 2**32
    assert door.WRONG <= 100 and 10 <= door.WHILE <= 3600
    assert page.PAGES <= 1000 and page.WAITING <= 100 and visitor.REGIONS <= 64 and visitor.LONGEST <= 10_000


def test_an_event_has_a_size(caller, monkeypatch):
    monkeypatch.setattr(door, "EVENT", 10_000)
    assert caller.join(EDIT, caller.edit("x" * 10_000))[0] == 413
    monkeypatch.setattr(door, "HELD", 3_000)
    with caller.slow("POST", "/gradio_api/queue/join") as line:
        line.sendall(b"7d0\r\n" + b"x" * 2_000 + b"\r\n")
        until(lambda: caller.page.door.held == 2_000)
        assert caller.join(EDIT, caller.edit("x" * 2_000))[0] == 503
    until(lambda: caller.page.door.held == 0)
    assert caller.join(EDIT, caller.edit("x" * 2_000))[0] == 200


def test_who_is_slow_is_not_waited_for(caller, monkeypatch):
    monkeypatch.setattr(door, "PATIENCE", 0.2)
    monkeypatch.setattr(door, "SILENT", 0.2)
    with caller.slow("POST", "/gradio_api/queue/join") as line:
        assert b" 408 " in line.recv(1000)
    with socket.create_connection(("127.0.0.1", caller.page.port), 30) as line:
        line.sendall(b"GET / HTTP/1.1\r\n")
        assert line.recv(1000) == b""


def test_an_address_has_so_many_connections(caller, monkeypatch):
    monkeypatch.setattr(door, "MOST", 4)  # of which an address may have half
    pulse = caller.open_stream(f"/gradio_api/heartbeat/{caller.session}")
    next(pulse)
    with ExitStack() as lines:

        def line(last: int) -> socket.socket:
            to, own = ("127.0.0.1", caller.page.port), (f"127.0.0.{last}", 0)
            return lines.enter_context(socket.create_connection(to, 5, own))

        line(1)
        assert line(1).recv(1000) == b""  # its third
        line(2), line(3)
        assert line(4).recv(1000) == b""  # the fifth at all
    until(lambda: caller.ask("GET", "/theme.css")[0] == 200)
    pulse.close()


def test_files_are_made_one_at_a_time_of_a_visitor(page, caller, monkeypatch):
    from pages import Caller

    now, made, go_on = [], [], threading.Event()

    def file(self, what):
        now.append(self)
        assert go_on.wait(60)
        now.remove(self)
        made.append(what)
        return "a", b"x"

    monkeypatch.setattr(type(caller.visitor), "file", file)
    second, third = (Caller(page).enter() for _ in range(2))
    with ThreadPoolExecutor() as pool:

        def ask(one: Caller) -> Future:
            return pool.submit(one.ask, "GET", f"/save/{one.key}/picture")

        asked = [ask(caller)]
        until(lambda: len(now) == 1)
        asked.append(ask(caller))
        caller.leave("GET", f"/save/{caller.key}/strip")
        time.sleep(0.1)
        assert now == [caller.visitor]  # who has one at a time
        asked.append(ask(second))
        until(lambda: len(now) == 2)
        asked.append(ask(third))
        time.sleep(0.1)
        assert now == [caller.visitor, second.visitor]  # and all of them two
        go_on.set()
        assert [answer.result()[0] for answer in asked] == [200] * 4
        assert caller.ask("GET", f"/save/{caller.key}/canvas")[0] == 200
    assert sorted(made) == ["canvas", *["picture"] * 4]  # and nothing for who is gone


# ---- which pages are kept


def test_a_page_that_is_open_does_not_go_for_another(page, caller, monkeypatch):
    from pages import Caller

    monkeypatch.setattr("emilie_min.app.page.PAGES", 3)
    kept, listening = page.state_holder.session_data, page.door.pages.listening
    for old in set(kept) - {caller.session}:
        del kept[old]
    pulse = caller.open_stream(f"/gradio_api/heartbeat/{caller.session}")
    next(pulse)
    left, *_, newest = [Caller(page).enter() for _ in range(4)]
    assert left.key not in page.visitors and newest.key in page.visitors and len(kept) == 3
    assert left.session not in page._queue.pending_messages_per_session
    assert left.session not in page._queue.pending_event_ids_session
    assert "At 0" in caller.do(TREE, [None], event_data={"state": "0"})
    listening.update(list(kept))
    assert Caller(page).join(LOAD, [None]) == (503, b"too many pages are open here: come back later")
    assert "nothing to undo" in newest.do(UNDO, [None])
    listening.subtract(list(kept))
    pulse.close()
    until(lambda: not +listening)


def test_what_an_event_brings_is_not_kept(page, caller):
    caller.do(EDIT, caller.edit("make it " + "x" * 99_999))
    kept = page.state_holder.session_data[caller.session]
    assert len(repr([list(kept.components), kept.state_data])) < 90_000


def test_a_page_that_does_not_listen_is_not_told_for_ever(caller, monkeypatch):
    monkeypatch.setattr("emilie_min.app.page.UNHEARD", 5)
    until(lambda: caller.join(UNDO, [None])[0] == 503)
    assert caller.results()
    assert "nothing to undo" in caller.do(UNDO, [None])


# ---- several visitors


@pytest.fixture
def gate(monkeypatch):
    """Edits stop before their second step until this is set."""
    steps, gate = Canvas.steps, threading.Event()

    def waiting(self, *args, **kwargs):
        for step in steps(self, *args, **kwargs):
            yield step
            assert gate.wait(60)

    monkeypatch.setattr(Canvas, "steps", waiting)
    yield gate
    gate.set()


def until(what, seconds: float = 60):
    end = time.time() + seconds
    while not what():
        assert time.time() < end
        time.sleep(0.02)


def test_one_is_stopped_without_another(page, caller, gate):
    from pages import Caller

    other = Caller(page).enter()
    for one in (caller, other):
        assert one.join(EDIT, one.edit("make it night"))[0] == 200
    until(lambda: caller.visitor.busy.locked())
    messages = caller.messages()
    assert caller.join(UNDO, [None])[0] == 200  # on the same page nothing else happens meanwhile
    assert any("an edit is under way" in json.dumps(message) for message in messages)
    assert caller.ask("POST", f"/stop/{caller.key}", b"")[0] == 204
    gate.set()
    assert any("stopped: the picture is as it was" in json.dumps(message) for message in messages)
    assert "Edit 1: make it night" in json.dumps(other.results())
    assert len(caller.visitor.canvas.states) == 1 and len(other.visitor.canvas.states) == 2


def test_an_edit_that_waits_is_stopped_too(page, caller, gate):
    from pages import Caller

    other = Caller(page).enter()
    assert other.join(EDIT, other.edit("make it night"))[0] == 200
    until(lambda: other.visitor.busy.locked())
    assert caller.join(EDIT, caller.edit("make it night"))[0] == 200  # and waits, for the networks do one at a time
    assert caller.ask("POST", f"/stop/{caller.key}", b"")[0] == 204
    gate.set()
    assert "stopped before it began" in json.dumps(caller.results())
    assert "Edit 1: make it night" in json.dumps(other.results())
    assert len(caller.visitor.canvas.states) == 1
    assert "Edit 1" in caller.do(EDIT, caller.edit("make it night"))  # and what is asked for later is done


def test_a_closed_page_stops_its_edit(caller, gate):
    assert caller.join(EDIT, caller.edit("make it night"))[0] == 200
    stream = caller.open_stream()
    until(lambda: caller.visitor.busy.locked())
    next(stream)
    stream.close()
    time.sleep(0.5)
    gate.set()
    until(lambda: not caller.visitor.busy.locked())
    assert len(caller.visitor.canvas.states) == 1


def test_the_queue_has_a_length(caller, gate):
    from emilie_min.app.page import WAITING

    answers = [caller.join(EDIT, caller.edit("make it night"))[0] for _ in range(WAITING + 5)]
    assert answers[:WAITING] == [200] * WAITING and answers[-1] == 503
    caller.ask("POST", f"/stop/{caller.key}", b"")  # past the queue
    assert caller.visitor.stopped
    stream = caller.open_stream()
    next(stream)
    stream.close()  # and all that waits is gone


def test_a_crash_leaves_the_page_alive(caller, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Canvas, "steps", lambda *_, **__: 1 / 0)
        told = caller.do(EDIT, caller.edit("make it night"))
        by_name = caller.do(EDIT_BY_NAME, [*caller.edit("make it night")[:-1]])
    assert "failed here" in told and "division" not in told and "ZeroDivisionError" in capsys.readouterr().err
    assert "failed here" in by_name and "division" not in by_name
    assert "Edit 1" in caller.do(EDIT, caller.edit("make it night"))


def test_a_page_that_was_closed_is_forgotten(page, monkeypatch):
    from pages import Caller

    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")  # gradio then keeps a closed page's state for a second, not an hour
    caller = Caller(page)
    pulse = caller.open_stream(f"/gradio_api/heartbeat/{caller.session}")
    caller.enter()
    next(pulse)
    time.sleep(2.5)
    assert caller.key in page.visitors  # as long as it is open
    pulse.close()
    until(lambda: caller.key not in page.visitors)


# ---- who comes in


def test_only_from_this_computer(caller):
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:7860", "127.0.0.1/x", ""):
        assert caller.ask("GET", "/", Host=host)[0] in (400, 403), host
    for host in ("localhost", "127.0.0.1", f"localhost:{caller.page.port}", "[::1]:1"):
        assert caller.ask("GET", "/", Host=host)[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://127.0.0.1", "http://[", "", "http://"):
        assert caller.ask("POST", f"/stop/{caller.key}", b"", Origin=origin)[0] == 403
    assert caller.ask("POST", f"/stop/{caller.key}", b"", Origin=caller.page.url[:-1])[0] == 204


def test_few_wrong_passwords_are_heard(editor, monkeypatch):
    from pages import Caller, served

    monkeypatch.setattr(door, "WHILE", 2.0)
    with served(editor, local=False, password="ann:pw") as page:
        right = Caller(page, "ann:pw")
        for _ in range(3):
            assert Caller(page).ask("GET", "/")[0] == 401  # who has said none yet
        asked = [
            Caller(page, f"ann:{i}").ask("GET", "/", X_Forwarded_For=f"10.0.0.{i}")[0] for i in range(door.WRONG + 5)
        ]
        assert asked == [401] * door.WRONG + [429] * 5
        assert right.ask("GET", "/theme.css")[0] == 429  # or the right one could be found while waiting
        until(lambda: right.ask("GET", "/theme.css")[0] == 200, 10)


def test_with_a_password(editor, monkeypatch):
    from pages import Caller, served

    monkeypatch.setattr(door, "WRONG", 10**6)
    with served(editor, local=False, password="ann:p:w") as page:
        right = Caller(page, "ann:p:w").enter()
        ways = [
            ("GET", "/"),
            ("GET", "/theme.css"),
            ("POST", "/gradio_api/queue/join"),
            ("GET", f"/save/{right.key}/picture"),
        ]
        ways += [("POST", f"/open/{right.key}"), ("POST", f"/stop/{right.key}"), ("GET", "/gradio_api/heartbeat/x")]
        for wrong in ("", "ann:", "ann:p", "ann", "bob:p:w", "ann:p:w:"):
            for method, path in ways:
                status, _, headers = Caller(page, wrong).ask(method, path, b"{}" if method == "POST" else None)
                assert status == 401 and headers["www-authenticate"] == "Basic", (wrong, path)
        assert right.ask("GET", f"/save/{right.key}/picture")[0] == 200
        assert right.ask("GET", "/?token=")[0] == 200 and Caller(page).ask("GET", "/?token=")[0] == 401


def test_with_a_link_that_works_once(editor):
    from pages import Caller, served

    with served(editor, local=False, link="a-secret") as page:
        caller = Caller(page)
        for path in (
            "/",
            "/?token=",
            "/?token=a-secre",
            "/theme.css?token=a-secret",
            "/gradio_api/queue/data?token=a-secret",
        ):
            assert caller.ask("GET", path)[0] == 401
        for i in range(door.WRONG + 1):  # a password that is not asked for locks nobody out
            assert Caller(page, f"ann:{i}").ask("GET", "/")[0] == 401
        assert caller.ask("HEAD", "/?token=a-secret")[0] == caller.ask("POST", "/?token=a-secret", b"")[0] == 401
        status, _, headers = caller.ask("GET", "/?token=a-secret")  # which those have not used up
        assert (
            status == 303
            and headers["location"] == "/"
            and headers["set-cookie"].endswith(
                "; HttpOnly; Path=/; SameSite=lax"  # strict: who followed the link from a page, as of mails, were out
            )
        )
        status, told, _ = caller.ask("GET", "/?token=a-secret")
        assert status == 401 and b"the link was used" in told
        assert caller.ask("GET", "/", Cookie="emilie=")[0] == caller.ask("GET", "/", Cookie="emilie=x")[0] == 401
        caller.headers["Cookie"] = headers["set-cookie"].partition(";")[0]
        assert caller.ask("GET", "/")[0] == 200
        assert "of the small world" in caller.do(LOAD, [None])


def test_of_wrong_passwords_no_endless_list_is_kept():
    closed = door.Door(lambda *_: None, {}, None, local=False, auth=door.Auth("ann:pw"))
    for i in range(1500):
        scope = {"type": "http", "headers": [(b"authorization", b"Basic x")], "client": (f"address {i}", 1)}
        assert not closed.admits(door.Request(scope))
    assert len(closed.wrong) <= 1001


@pytest.mark.parametrize(
    "host, password, note",
    [("127.0.0.1", None, ""), ("0.0.0.0", None, "link first"), ("0.0.0.0", "a:b", "password")],
)
def test_listening_beyond_this_computer_is_said(editor, host, password, note, monkeypatch, capsys, recwarn):
    from emilie_min.app import studio

    made = {}

    class Server:
        def run(self, sockets):
            made["port"] = sockets[0].getsockname()[1]

    def serve(editor, *settings):
        made["settings"] = settings
        return None, Server()

    monkeypatch.setattr(studio, "serve", serve)
    studio.studio(editor, host, 0, password=password)
    out, local, link = capsys.readouterr().out, *(made["settings"][i] for i in (0, 2))
    assert made["settings"][1] == (password or "") and local == (host == "127.0.0.1")
    assert bool(link) == (not local and password is None)
    assert f"http://{host}:{made['port']}/" + (f"?token={link}" if link else "") + " " in out
    assert note in " ".join(str(w.message) for w in recwarn) and (bool(recwarn.list) != local)


@pytest.mark.parametrize("password", ["", "ann", "ann:", ":pw"])
def test_half_a_password(password, editor):
    from emilie_min.app import studio
    from emilie_min.errors import EmilieError

    with pytest.raises(EmilieError, match="USER:PASSWORD"):
        studio.studio(editor, port=0, password=password)
