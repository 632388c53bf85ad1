"""The studio: what a visitor's session does, and the page itself as a person uses it in a real browser."""

import base64
import importlib.util
import io
import itertools
import json
import re
import shutil
import socket
import sys
import threading
import time
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import emilie_min
from emilie_min.app import studio
from emilie_min.app.studio import Session, Sessions
from emilie_min.emilie import Canvas
from emilie_min.errors import CanvasError, CheckpointError, EmilieError, ImageError, InstructionError, MaskError
from emilie_min.toy import world

STEPS = 2


@pytest.fixture(scope="module")
def editor():
    editor = emilie_min.load(device="cpu")
    editor.config.sampling.steps = STEPS
    return editor


@pytest.fixture
def session(editor, tmp_path):
    session = Session(editor, str(tmp_path))
    session.new_scene(3)
    return session


def painted(box: tuple[int, int, int, int] | None, size=(64, 64)) -> str:
    """A mask as the page sends it: opaque in a box."""
    board = Image.new("RGBA", size)
    if box:
        board.paste((255, 0, 120, 255), box)
    return studio.data_url(board)


# ---- a session


def test_an_edit_happens_where_there_is_paint(session):
    before = np.array(session.canvas.image).astype(int)
    told = session.edit("make it night", painted((0, 0, 32, 64)), keep_background=True)
    change = abs(np.array(session.canvas.image) - before).mean((0, 2))
    assert change[:24].min() > 10 and change[32:].max() == 0
    assert told.startswith("Edit 1: make it night, where you painted")


def test_an_edit_without_paint_is_everywhere_and_has_no_background_to_keep(session):
    assert "everywhere" in session.edit("make it night", "", keep_background=True)
    assert session.canvas.state.mask is None and session.canvas.state.settings["keep_background"] is False


def test_every_step_is_told(session):
    done = []
    session.edit("make it night", step=done.append, steps=5)
    assert done == [1, 2, 3, 4, 5]


def test_a_stopped_edit_changes_nothing(session):
    def stop_at_2(done):
        session.stopped = done == 2

    with pytest.raises(CanvasError, match="stopped"):
        session.edit("make it night", step=stop_at_2, steps=5)
    assert len(session.canvas.states) == 1
    session.edit("make it night")  # and the next one goes through
    assert len(session.canvas.states) == 2


BAD_PAINT = {
    "nothing": (painted(None), "nothing is painted"),
    "one pixel": (painted((9, 9, 10, 10)), "vanishes"),
    "another size": (painted((0, 0, 9, 9), (32, 32)), "same size"),
    "no PNG": ("data:image/png;base64,AAAA", "paint it again"),
    "no base64": ("data:image/png;base64,%%%", "paint it again"),
    "no alpha": ("data:image/png;base64,R0lGODlhAQABAAAAACw=", "paint it again"),
}


@pytest.mark.parametrize("name", BAD_PAINT)
def test_bad_paint_is_told_and_harms_nothing(name, session):
    paint, message = BAD_PAINT[name]
    with pytest.raises(MaskError, match=message):
        session.edit("make it night", paint)
    assert len(session.canvas.states) == 1


def test_an_unknown_word_is_told_and_harms_nothing(session):
    with pytest.raises(InstructionError, match="'winter'"):
        session.edit("make it winter")
    assert len(session.canvas.states) == 1


def test_undo_gives_the_paint_back_to_try_again(session):
    session.edit("make it night", painted((0, 0, 32, 64)))
    assert session.paint is None
    assert "At 0" in session.undo()
    paint = re.search('data-paint="([^"]+)"', studio.picture_html(session))[1]
    assert studio.read_paint(paint).getbbox() == (0, 0, 32, 64)
    session.edit("make it night", paint)
    assert np.array_equal(session.canvas.states[1].image, session.canvas.states[2].image)
    session.branch(1)
    assert session.paint is None
    with pytest.raises(CanvasError, match="nothing to redo"):
        session.redo()


def test_before_there_is_a_picture_everything_else_is_refused(editor):
    session = Session(editor)
    for action in (lambda: session.edit("make it night"), session.undo, session.redo, lambda: session.branch(0)):
        with pytest.raises(CanvasError, match="open one"):
            action()
    assert "Open a picture" in studio.picture_html(session) and studio.tree_html(session.canvas) == ""


def test_a_bad_upload_is_told_by_its_name_and_harms_nothing(session, tmp_path):
    session.edit("make it night")
    canvas = session.canvas
    for name, kind in (("broken.png", ImageError), ("text.txt", ImageError), ("no.safetensors", CanvasError)):
        path = tmp_path / "private" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x89PNG\r\n")
        with pytest.raises(kind, match=f"^{name} cannot be read"):
            session.open(str(path))
        assert session.canvas is canvas and session.name == "scene3"


def test_a_saved_canvas_goes_on(session, editor, tmp_path):
    session.edit("make it night")
    session.edit("make it day")
    session.undo()
    _, _, path = session.files()
    other = Session(editor, str(tmp_path))
    assert other.open(path) == "scene3.canvas.safetensors is open"
    assert other.canvas.at == 1 and [s.instruction for s in other.canvas.states[1:]] == ["make it night", "make it day"]
    assert other.name == "scene3"
    stranger = Session(emilie_min.load("random", "toy", device="cpu"), str(tmp_path))
    assert "goes on with" in stranger.open(path)  # a note, not an error


def test_what_can_be_downloaded_is_what_is_seen(session, tmp_path):
    session.edit("make it night")
    first = session.files()
    session.edit("make it day")
    picture, row, canvas = session.files()
    names = ["scene3_2.png", "scene3_2_strip.png", "scene3.canvas.safetensors"]
    assert [Path(p).name for p in (picture, row, canvas)] == names
    assert np.array_equal(Image.open(picture), session.canvas.image)
    assert Image.open(row).width > 3 * 256
    assert not Path(first[0]).exists()  # one moment's files only
    session.forget()
    assert list(tmp_path.iterdir()) == []


def test_suggestions_can_be_followed_in_this_very_picture(session):
    texts = session.suggestions()
    assert len(texts) == len(world.possible(world.scene(3))) and set(texts) <= set(world.instructions())
    things = {f"{o.colour} {o.shape}" for o in world.scene(3).objects}
    recoloured = next(text for text in texts if text.startswith("make the"))
    assert any(set(recoloured.split()) & {thing.split()[1]} for thing in things)


def test_another_picture_gets_suggestions_without_shapes(session, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    session.open(str(tmp_path / "noise.png"))
    ground, look = session.suggestions()
    assert ground.startswith("change the background") and look in world.STYLE_TEXTS.values()


def test_the_tree_of_edits(session):
    for at, text in ((0, "make it night"), (1, "make it day"), (0, "turn it into a comic"), (1, "make it night")):
        session.branch(at)
        session.edit(text, steps=1)
    page = studio.tree_html(session.canvas)
    places = re.findall(r'data-state="(\d)"[^>]*style="grid-area:(\d)/(\d)"', page)
    #                   state, row, column: 0 - 1 - 2, then the branch from 1 to 4, then that from 0 to 3
    assert places == [("0", "1", "1"), ("1", "1", "2"), ("2", "1", "3"), ("4", "2", "3"), ("3", "3", "2")]
    assert page.count('class="branch"') == 2
    assert re.findall(r'class="state here" data-state="(\d)"', page) == ["4"]
    assert "<b>3</b> turn it into a comic" in page and "text_scale 1.5" in unescape(page)


def test_nothing_that_a_canvas_file_says_becomes_markup(session):
    session.edit("make it night", steps=1)
    session.canvas.states[1].instruction = "<img src=x onerror=alert(1)>"
    session.canvas.states[1].settings["gate"] = '"><script>'
    page = studio.tree_html(session.canvas)
    assert "<img src=x" not in page and "<script>" not in page


# ---- sessions


def test_every_page_has_its_own_canvas(editor):
    sessions = Sessions(editor)
    sessions.visit("a").new_scene(1)
    assert sessions.visit("b").canvas is None and sessions.visit("a").name == "scene1"


def test_a_closed_pages_canvas_and_files_are_dropped_unless_it_is_back_in_time(editor, tmp_path):
    sessions = Sessions(editor, str(tmp_path), kept=0.3)
    for key in "ab":
        sessions.visit(key).new_scene(1)
        sessions[key].files()
        sessions.close(key)
    sessions.visit("b")
    time.sleep(0.8)
    assert list(sessions) == ["b"] and len(list(tmp_path.iterdir())) == 1


def test_closing_the_page_stops_its_edit(editor):
    sessions = Sessions(editor)
    session = sessions.visit("a")
    session.new_scene(1)
    with pytest.raises(CanvasError, match="stopped"):
        session.edit("make it night", step=lambda done: sessions.close("a"), steps=5)


# ---- starting


def test_a_port_that_is_taken_is_told(editor):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(EmilieError, match=f"cannot serve on 127.0.0.1:{port}: .*in use; choose another --port"):
            studio.studio(editor, port=port)


def test_without_gradio_the_extra_is_named(editor, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(EmilieError, match=re.escape("pip install 'emilie_min[studio]'")):
        studio.studio(editor, port=0)


def test_a_model_that_cannot_edit_is_refused_at_once():
    with pytest.raises(CheckpointError, match="needs 8"):
        studio.build(emilie_min.load("random", "toy-t2i", device="cpu"))


# ---- the page, in a browser

missing = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
missing += [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.*")  # its own, of pandas
in_browser = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)


class Visitor:
    """A person at the page."""

    def __init__(self, page, folder: Path):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        for flag in [*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.page, self.folder = page, folder / "downloads"
        behaviour = {"behavior": "allow", "downloadPath": str(self.folder)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)

    def visit(self) -> Session:
        """Open the page in the current tab; the session that this makes."""
        known = set(self.page.sessions)
        self.driver.get(self.page.url)
        self.until(lambda: self.all("#edits .state") and self.told)
        (key,) = set(self.page.sessions) - known
        return self.page.sessions[key]

    def all(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def click(self, css: str, which: int = 0) -> None:
        self.until(lambda: self.all(css)[which].is_enabled())
        self.all(css)[which].click()

    def until(self, what, seconds: float = 120):
        end = time.time() + seconds
        while True:
            try:
                result = what()
            except Exception as error:  # an element that was just replaced
                result, why = None, error
            else:
                why = None
            if result:
                return result
            assert time.time() < end, f"waited {seconds} s; the page says: {self.told} {why or ''}"
            time.sleep(0.05)

    @property
    def told(self) -> str:
        return "".join(e.get_attribute("textContent") for e in self.all("#status p"))

    def say(self, text: str) -> None:
        box = self.all("textarea")[0]
        box.clear()
        box.send_keys(text)

    def drag(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """With the mouse over the picture; in pixels of the picture."""
        from selenium.webdriver.common.action_chains import ActionChains

        board = self.all("#picture canvas")[0]
        scale = board.size["width"] / int(board.get_attribute("width"))
        size = np.array([board.size["width"], board.size["height"]])
        (x0, y0), (x1, y1) = (np.array(start) * scale - size / 2, np.array(end) * scale - size / 2)
        chain = ActionChains(self.driver, duration=50).move_to_element_with_offset(board, int(x0), int(y0))
        chain.click_and_hold().move_by_offset(int(x1 - x0), int(y1 - y0)).release().perform()

    def shown(self) -> Image.Image:
        url = self.all("#picture .board img")[0].get_attribute("src")
        return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))

    def upload(self, path: Path) -> None:
        self.all("input[type=file]")[0].send_keys(str(path))

    def download(self, css: str) -> Path:
        had = set(self.folder.glob("*"))
        self.click(css)
        new = self.until(lambda: [p for p in set(self.folder.glob("*")) - had if p.suffix != ".crdownload"])
        return new[0]


@pytest.fixture(scope="module")
def page(editor):
    seeds = itertools.count(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio.random, "randrange", lambda _: next(seeds))
        page, server = studio.serve(editor)
        listener = studio.listen(port=0)
        page.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield page
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def visitor(page, tmp_path_factory):
    visitor = Visitor(page, tmp_path_factory.mktemp("visitor"))
    yield visitor
    visitor.driver.quit()


@in_browser
def test_a_person_paints_edits_undoes_branches_and_saves(visitor, editor):
    session = visitor.visit()
    before = visitor.shown()
    assert np.array_equal(before, session.canvas.image) and visitor.all("#picture .pixels")
    visitor.click("#scene")
    visitor.until(lambda: session.canvas and not np.array_equal(visitor.shown(), before))
    before = visitor.shown()  # scene 4, by day

    visitor.click("#advanced button")
    visitor.click("#keep input")
    visitor.say("make it night")  # a stroke with the brush, then a box beside it
    visitor.drag((8, 8), (8, 56))
    visitor.click("[data-tool=box]")
    visitor.drag((16, 0), (32, 64))
    visitor.click("#go")
    visitor.until(lambda: visitor.told.startswith("Edit 1: make it night, where you painted"))
    mask = np.array(session.canvas.state.mask)
    assert mask[:, 17:31].all() and mask[8:56, 6:10].all() and not mask[:, 34:].any() and not mask[:2, :14].any()
    after = visitor.until(lambda: np.array_equal(visitor.shown(), session.canvas.image) and visitor.shown())
    change = abs(np.array(after).astype(int) - np.array(before)).mean((0, 2))
    assert change[20:28].min() > 10 and change[34:].max() == 0
    assert len(visitor.all("#edits .state")) == 2
    assert not visitor.driver.execute_script("return document.querySelector('#picture canvas').dataset.touched")

    visitor.click("#undo")
    visitor.until(lambda: np.array_equal(visitor.shown(), before))
    visitor.click("[data-tool=clear]")  # else the paint of the edit that was undone would count
    visitor.click("#examples .gallery-item", -1)
    visitor.until(lambda: visitor.all("textarea")[0].get_attribute("value") == session.suggestions()[-1])
    visitor.all("textarea")[0].send_keys("\n")
    visitor.until(lambda: visitor.told.startswith("Edit 2: ") and "everywhere" in visitor.told)
    visitor.until(lambda: len(visitor.all("#edits .state")) == 3)
    visitor.click("#edits [data-state='1']")
    visitor.until(lambda: visitor.told.startswith("At 1, make it night"))
    assert session.canvas.at == 1 and [s.parent for s in session.canvas.states] == [None, 0, 0]

    picture = visitor.download("#save-picture")
    assert picture.name == f"{session.name}_1.png" and np.array_equal(Image.open(picture), after)
    assert Image.open(visitor.download("#save-strip")).height > 256
    canvas = emilie_min.open_canvas(visitor.download("#save-canvas"), editor)
    assert canvas.at == 1 and np.array_equal(canvas.image, after) and len(canvas.states) == 3


@in_browser
def test_what_goes_wrong_is_told_on_the_page_and_harms_nothing(visitor, tmp_path):
    session = visitor.visit()
    canvas, before = session.canvas, visitor.shown()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n")
    visitor.upload(broken)
    visitor.until(lambda: "broken.png cannot be read as a picture" in visitor.told)
    visitor.say("make it winter <b>")
    visitor.click("#go")
    visitor.until(lambda: "does not know 'winter', '<b>'" in visitor.told)
    visitor.say("make it night")
    visitor.click("[data-tool=erase]")
    visitor.drag((8, 8), (8, 56))
    visitor.click("#go")
    visitor.until(lambda: "nothing is painted" in visitor.told)
    assert session.canvas is canvas and len(canvas.states) == 1
    assert np.array_equal(visitor.shown(), before) and len(visitor.all("#edits .state")) == 1

    world.render(world.scene(5)).resize((96, 64)).save(tmp_path / "photo.png")
    visitor.upload(tmp_path / "photo.png")
    visitor.until(lambda: visitor.told == "photo.png is open")
    assert visitor.until(lambda: visitor.shown().size == session.canvas.image.size)


@in_browser
def test_a_second_visitor_waits_and_a_closed_page_is_forgotten(visitor, page, monkeypatch):
    edit, both_asked, log = Canvas.edit, threading.Event(), []

    def watched(self, *args, **kwargs):
        log.append("begins")
        assert both_asked.wait(120)
        time.sleep(0.5)  # time for another to begin, if it could
        image = edit(self, *args, **kwargs)
        log.append("ends")
        return image

    monkeypatch.setattr(Canvas, "edit", watched)
    driver = visitor.driver
    first = visitor.visit()
    visitor.say("make it night")
    visitor.click("#go")
    visitor.until(lambda: log == ["begins"])
    visitor.click("#edits .state")  # on the same page nothing else happens meanwhile
    visitor.until(lambda: "an edit is under way" in visitor.told)
    driver.switch_to.new_window("tab")
    known = len(page.sessions)
    driver.get(page.url)  # a second visitor's first picture waits too: the networks are busy
    visitor.until(lambda: "queue" in visitor.all("#picture")[0].text)
    assert log == ["begins"] and not visitor.all("#edits .state")
    both_asked.set()
    visitor.until(lambda: visitor.all("#edits .state"))
    assert len(page.sessions) == known + 1
    second = list(page.sessions.values())[-1]
    visitor.say("make it day")
    visitor.click("#go")
    visitor.until(lambda: len(second.canvas.states) == 2)
    assert log == ["begins", "ends"] * 2
    assert first.canvas is not second.canvas and first.canvas.state.instruction == "make it night"

    page.sessions.kept = 0
    driver.close()
    driver.switch_to.window(driver.window_handles[0])
    visitor.until(lambda: second not in page.sessions.values())
    assert first in page.sessions.values()


@in_browser
def test_the_page_asks_nothing_of_any_other_computer(visitor, page):
    visitor.visit()
    events = [json.loads(entry["message"])["message"] for entry in visitor.driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    own = (page.url, "data:", "blob:", "chrome:", "chrome-untrusted:")  # chrome: the browser's own first tab
    assert len(urls) > 10 and [url for url in urls if not url.startswith(own)] == []
    errors = [e for e in visitor.driver.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []
