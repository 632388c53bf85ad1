"""The studio: what a visitor's session does, and the page itself as a person uses it in a real browser."""

import base64
import importlib.util
import io
import itertools
import json
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pages import served
from PIL import Image

import emilie_min
from emilie_min.app import studio, visitor
from emilie_min.app.layers import change, stack_html
from emilie_min.app.visitor import Visitor
from emilie_min.canvas.canvas import Canvas
from emilie_min.errors import CanvasError, CheckpointError, EmilieError, ImageError, InstructionError, MaskError
from emilie_min.toy import world

STEPS = 2


@pytest.fixture(scope="module")
def editor():
    editor = emilie_min.load(device="cpu")
    editor.config.sampling.steps = STEPS
    return editor


@pytest.fixture
def session(editor):
    session = Visitor(editor)
    session.new_scene(3)
    return session


def edit(session: Visitor, text: str, paint: str = "", **settings) -> str:
    """An edit to its end; what is told then."""
    *_, (told, done, _) = session.edit(text, paint, **settings)
    assert done == 1
    return told


def painted(box: tuple[int, int, int, int] | None, size=(64, 64)) -> str:
    """A mask as the page sends it: opaque in a box."""
    board = Image.new("RGBA", size)
    if box:
        board.paste((255, 0, 120, 255), box)
    return visitor.data_url(board)


# ---- a session


def test_an_edit_happens_where_there_is_paint(session):
    before = np.array(session.canvas.image).astype(int)
    told = edit(session, "make it night", painted((0, 0, 32, 64)), keep_background=True)
    change = abs(np.array(session.canvas.image) - before).mean((0, 2))
    assert change[:24].min() > 10 and change[32:].max() == 0
    assert told.startswith("Edit 1: make it night, where you painted")


def test_an_edit_without_paint_is_everywhere_and_has_no_background_to_keep(session):
    assert "everywhere" in edit(session, "make it night", "", keep_background=True)
    assert session.canvas.state.mask is None and session.canvas.state.settings["keep_background"] is False


def test_every_step_is_told(session):
    told = list(session.edit("make it night", steps=5))
    assert [note.partition(":")[0] for note, _, _ in told] == [f"Step {i} of 5" for i in range(6)] + ["Edit 1"]
    assert [done for _, done, _ in told] == [0, 0.2, 0.4, 0.6, 0.8, 1, 1]


def test_a_stopped_edit_changes_nothing(session):
    steps = session.edit("make it night", steps=5)
    next(steps), next(steps)
    session.stopped = True
    with pytest.raises(CanvasError, match="stopped"):
        next(steps)
    assert len(session.canvas.states) == 1
    edit(session, "make it night")  # and the next one goes through
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
        edit(session, "make it night", paint)
    assert len(session.canvas.states) == 1


def test_an_unknown_word_is_told_and_harms_nothing(session):
    with pytest.raises(InstructionError, match="'winter'"):
        edit(session, "make it winter")
    assert len(session.canvas.states) == 1


def test_undo_gives_the_paint_back_to_try_again(session):
    edit(session, "make it night", painted((0, 0, 32, 64)))
    assert session.paint is None
    assert "At 0" in session.undo()
    paint = re.search('data-paint="([^"]+)"', visitor.picture_html(session))[1]
    assert visitor.read_paint(paint, (64, 64)).getbbox() == (0, 0, 32, 64)
    edit(session, "make it night", paint)
    assert np.array_equal(session.canvas.states[1].image, session.canvas.states[2].image)
    session.branch(1)
    assert session.paint is None
    with pytest.raises(CanvasError, match="nothing to redo"):
        session.redo()


def test_before_there_is_a_picture_everything_else_is_refused(editor):
    session = Visitor(editor)
    for action in (lambda: edit(session, "make it night"), session.undo, session.redo, lambda: session.branch(0)):
        with pytest.raises(CanvasError, match="open one"):
            action()
    assert "Open a picture" in visitor.picture_html(session) and visitor.tree_html(session.canvas) == ""
    assert stack_html(session) == "" and session.suggestions() == []


def test_a_bad_upload_is_told_by_its_name_and_harms_nothing(session, tmp_path):
    edit(session, "make it night")
    canvas = session.canvas
    for name, kind in (("broken.png", ImageError), ("text.txt", ImageError), ("no.safetensors", CanvasError)):
        path = tmp_path / "private" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x89PNG\r\n")
        with pytest.raises(kind, match=f"^{name} cannot be read"):
            session.open(str(path))
        assert session.canvas is canvas and session.name == "scene3"


def test_a_canvas_of_many_states_is_not_for_the_page(session, tmp_path, monkeypatch):
    monkeypatch.setattr(visitor, "STATES", 1)
    edit(session, "make it night", steps=1)
    canvas, data = session.canvas, session.file("canvas")[1]
    (tmp_path / "a.canvas").write_bytes(data)
    with pytest.raises(CanvasError, match="a.canvas has 2 states: the page shows 1 at most"):
        session.open(str(tmp_path / "a.canvas"))
    assert session.canvas is canvas


def test_where_others_have_large_pictures_no_more_are_taken(editor, monkeypatch):
    everyone: dict = {}
    first, second = (Visitor(editor, None, everyone) for _ in range(2))
    everyone.update(a=first, b=second)
    url = visitor.data_url(world.render(world.scene(3)))
    first.open_url(url)
    first.propose_url(url, "", "a square", painted((0, 0, 32, 32)), 4, None)
    assert first.pixels == 2 * 64 * 64
    monkeypatch.setattr(visitor, "PIXELS", first.pixels - 1)
    second.new_scene(4)
    for take in (lambda: second.open_url(url), lambda: second.propose_url(url, "", "", "", 4, None)):
        with pytest.raises(ImageError, match="too many large pictures"):
            take()
    for take in (second.open_uploaded, second.drop_uploaded, second.mask_uploaded):
        with pytest.raises(ImageError, match="too many large pictures"):
            second.uploaded = "a.png", tempfile.TemporaryDirectory()
            take()
    first.open_url(url)  # who has them may change them


def test_a_saved_canvas_goes_on(session, editor, tmp_path):
    edit(session, "make it night")
    edit(session, "make it day")
    session.undo()
    name, data = session.file("canvas")
    path = tmp_path / name
    path.write_bytes(data)
    other = Visitor(editor)
    assert other.open(str(path)) == "scene3.canvas is open"
    assert other.canvas.at == 1 and [s.instruction for s in other.canvas.states[1:]] == ["make it night", "make it day"]
    assert other.name == "scene3" and other.view() == other.canvas.image
    assert "aspect-ratio:64/64" in visitor.picture_html(other)
    assert "where you painted" in edit(other, "make it day", painted((0, 0, 32, 64)))
    url = "data:;base64," + base64.b64encode(data).decode()
    for bad, told in ((url, "this is no picture"), ("data:;base64,@@", "data URL"), ("/etc/passwd", "data URL")):
        with pytest.raises(ImageError, match=told):
            other.open_url(bad)
    stranger = Visitor(emilie_min.load("random", "toy", device="cpu"))
    assert "goes on with" in stranger.open(str(path))  # a note, not an error


def test_what_can_be_saved_is_what_is_seen(session):
    edit(session, "make it night")
    edit(session, "make it day")
    made = [session.file(what) for what in ("picture", "strip", "canvas")]
    assert [name for name, _ in made] == ["scene3_2.png", "scene3_2_strip.png", "scene3.canvas"]
    picture, row = (Image.open(io.BytesIO(data)) for _, data in made[:2])
    assert np.array_equal(picture, session.canvas.image) and row.width > 3 * 256
    assert session.file("key") is None and Visitor(session.editor).file("picture") is None


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
        edit(session, text, steps=1)
    page = visitor.tree_html(session.canvas)
    places = re.findall(r'data-state="(\d)"[^>]*style="grid-area:(\d)/(\d)"', page)
    #                   state, row, column: 0 - 1 - 2, then the branch from 1 to 4, then that from 0 to 3
    assert places == [("0", "1", "1"), ("1", "1", "2"), ("2", "1", "3"), ("4", "2", "3"), ("3", "3", "2")]
    assert page.count('class="branch"') == 2
    assert re.findall(r'class="state here" data-state="(\d)"', page) == ["4"]
    assert "<b>3</b> turn it into a comic" in page and "text_scale 1.0" in unescape(page)


def test_nothing_that_a_canvas_file_says_becomes_markup(session):
    edit(session, "make it night", steps=1)
    session.canvas.states[1].instruction = "<img src=x onerror=alert(1)>"
    session.canvas.states[1].settings["gate"] = '"><script>'
    page = visitor.tree_html(session.canvas)
    assert "<img src=x" not in page and "<script>" not in page


# ---- a photo of its own size


@pytest.fixture
def visit(editor, tmp_path):
    """A visitor with a photo of a size that no working picture has."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    visit = Visitor(editor)
    assert "no scene of the small model's world" in visit.open(str(tmp_path / "photo.png"))
    return visit, np.asarray(photo)


def saved(session: Visitor) -> Image.Image:
    return Image.open(io.BytesIO(session.file("picture")[1]))


def test_what_is_saved_has_the_photos_size_and_outside_the_paint_its_bits(visit):
    session, photo = visit
    told = edit(session, "make it night", painted((0, 0, 32, 48), (64, 48)))
    picture, outside = saved(session), np.s_[:, 200:]
    assert picture.size == (400, 300) and np.array_equal(np.asarray(picture)[outside], photo[outside])
    assert "make it night" in picture.info["emilie"] and "% of that changed" in told
    assert "aspect-ratio:400/300" in visitor.picture_html(session)


def test_in_a_crop_and_back(visit):
    session, photo = visit
    told = edit(session, "make it night", painted((0, 0, 8, 8), (64, 48)), crop=True)
    assert "a new crop, 150x150 px at 0,0" in told and session.photo.box == (0, 0, 150, 150)
    moved = (np.asarray(saved(session)) != photo).any(-1)
    assert moved[:50, :50].mean() > 0.5 and not moved[50:].any() and not moved[:, 50:].any()
    assert "Undo leads back" not in stack_html(session)  # nothing was edited before it
    assert "goes on in the crop" in edit(session, "make it day", painted((8, 8, 16, 16)), crop=True)
    assert "back to the whole picture" in edit(session, "make it night") and session.photo.box == (0, 0, 400, 300)
    assert "Undo leads back" in stack_html(session)
    for _ in range(3):
        session.undo()
    assert np.array_equal(saved(session), photo)


def test_a_crop_that_is_stopped_is_left_again(visit):
    session, _ = visit
    steps = session.edit("make it night", painted((0, 0, 8, 8), (64, 48)), crop=True, steps=5)
    next(steps), next(steps)
    session.stopped = True
    with pytest.raises(CanvasError, match="stopped"):
        next(steps)
    assert session.photo.box == (0, 0, 400, 300) and len(session.canvas.states) == 1


def test_small_paint_gets_the_advice(visit):
    assert "a crop would do better" in edit(visit[0], "make it night", painted((0, 0, 8, 8), (64, 48)))


def test_regions_wait_for_the_edit_and_go_in_one_pass(session):
    assert "1 waiting, with the settings of now: make it night" in session.add_region(
        "make it night", painted((0, 0, 32, 32))
    )
    for bad in (("make it night", ""), ("", painted((0, 0, 32, 32)))):
        with pytest.raises(MaskError, match="needs both"):
            session.add_region(*bad)
    edit(session, "make it day", painted((32, 32, 64, 64)))
    assert [text for text, _ in session.canvas.state.regions] == ["make it day", "make it night"]
    assert session.regions == []
    session.add_region("make it night", painted((0, 0, 32, 32)))
    assert session.clear_regions() == "No region is waiting" and session.regions == []
    for _ in range(visitor.REGIONS):
        session.add_region("make it night", painted((0, 0, 32, 32)))
    with pytest.raises(MaskError, match="waiting already"):
        session.add_region("make it night", painted((0, 0, 32, 32)))


def test_a_region_keeps_the_settings_that_were_set_when_it_was_added(session):
    session.add_region("make it night", painted((0, 0, 32, 32)), text_scale=0.5, negative="", seed=0, gate="anchor")
    edit(session, "make it day", painted((32, 32, 64, 64)), text_scale=2.0)
    settings = session.canvas.state.settings
    assert settings["own"] == [{}, {"text_scale": 0.5, "seed": 0}] and settings["text_scale"] == 2


def test_an_edit_is_said_anew_and_the_later_ones_stay(session):
    edit(session, "make it night", painted((0, 0, 24, 64)), text_scale=0.5)
    session.add_region("make it night", painted((40, 0, 64, 32)), text_scale=0.75)
    edit(session, "make it day", painted((40, 32, 64, 64)))
    latent = session.canvas.latent
    ((told, _, _),) = change(session, {"state": 1, "change": "revise"})
    assert "Edit 1 is on the board" in told and session.paint == session.canvas.stack[0].mask
    assert session.filled["text"] == "make it night" and session.filled["text_scale"] == 0.5
    assert 'class="layer revised"' in stack_html(session)
    with pytest.raises(CanvasError, match="is as it was"):
        edit(session, "make it night", painted((0, 0, 24, 64)), text_scale=0.5)
    assert session.revised == 1
    told = edit(session, "turn it into a comic", painted((0, 0, 16, 64)))
    assert "Edit 1 is made anew" in told and session.revised is None
    first, second = session.canvas.stack
    assert (first.instruction, first.depth) == ("turn it into a comic", 0) and first.mask.getbbox() == (0, 0, 16, 64)
    assert (session.canvas.latent == latent)[..., 6:].all() and not (session.canvas.latent == latent).all()
    list(change(session, {"state": 2, "change": "revise"}))
    assert session.regions == [("make it night", second.regions[1][1], {"text_scale": 0.75})]
    assert "stays" in session.take_up(2) and session.regions == []
    session.take_up(1)
    edit(session, "turn it into a comic", painted((0, 0, 16, 64)), text_scale=0.25, part=0.5)
    assert session.canvas.stack[0].settings["scrubbed"]["step"] == 1
    assert session.canvas.stack[0].settings["text_scale"] == 0.25
    session.take_up(2)
    session.undo()
    assert session.revised is None and session.regions == []
    assert "data-paint" in visitor.picture_html(session)


def test_where_an_instruction_would_act_is_painted(session):
    assert "would act here" in session.where("remove the square") and session.paint.getbbox() is not None
    assert 'data-paint="data:image/png' in visitor.picture_html(session) and session.canvas.at == 0
    assert "all of the picture" in session.where("make it night") and session.paint is None


def test_scales_to_choose_from_are_branches(session):
    *_, (told, done, _) = session.try_scales("make it night", steps=1, text_scale=1.0, image_scale=1.0)
    assert done == 1 and "9 results" in told and session.canvas.at == 0
    states = session.canvas.states[1:]
    assert len({(s.settings["text_scale"], s.settings["image_scale"]) for s in states}) == 9
    assert {state.parent for state in states} == {0} and "text 0.67, image 0.8" in visitor.tree_html(session.canvas)


def test_steps_can_be_looked_at(session):
    seen = [picture for *_, picture in session.edit("make it night", steps=3) if picture is not None]
    assert seen and seen[0].size == (16, 16)
    off = abs(np.asarray(seen[0], float) - np.asarray(session.canvas.states[0].image.resize((16, 16)))).mean()
    assert off < 60  # of the first step, at full noise: already the scene


# ---- starting


def test_a_port_that_is_taken_is_told(editor):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(EmilieError, match=f"cannot serve on 127.0.0.1:{port}: .*in use; choose another --port"):
            studio.studio(editor, port=port)


def test_a_signal_ends_it_so_that_its_folders_go(editor, monkeypatch):
    server = SimpleNamespace(run=lambda sockets: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(studio, "serve", lambda *_: (None, server))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):  # and not the end on the spot that the signal is without
        studio.studio(editor, port=0)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "host, port, told",
    [("127.0.0.1", 70000, "0 to 65535"), ("\udcff", 0, "choose another --host"), ("", 0, "--host is empty")],
)
def test_where_nothing_can_listen_is_told(host, port, told):
    with pytest.raises(EmilieError, match=told):
        studio.listen(host, port)


def test_without_gradio_the_extra_is_named(editor, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(EmilieError, match=re.escape("pip install 'emilie_min[studio]'")):
        studio.studio(editor, port=0)


def test_a_model_that_cannot_edit_is_refused_at_once():
    with pytest.raises(CheckpointError, match="needs 8"):
        studio.serve(emilie_min.load("random", "toy-t2i", device="cpu"))


# ---- the page, in a browser

missing = [name for name in ("gradio", "selenium") if not importlib.util.find_spec(name)]
missing += [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.*")  # its own, of pandas
in_browser = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)


class Person:
    """At the page, in a browser."""

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

    def visit(self) -> Visitor:
        """Open the page in the current tab; the visitor that this makes."""
        known = set(self.page.visitors)
        self.driver.get(self.page.url)
        self.until(lambda: self.all("#edits .state") and self.told)
        (key,) = set(self.page.visitors) - known
        return self.page.visitors[key]

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
        patch.setattr("random.randrange", lambda _: next(seeds))
        with served(editor) as page:
            yield page


@pytest.fixture(scope="module")
def person(page, tmp_path_factory):
    person = Person(page, tmp_path_factory.mktemp("person"))
    yield person
    person.driver.quit()


@in_browser
def test_a_person_paints_edits_undoes_branches_and_saves(person, editor):
    session = person.visit()
    before = person.shown()
    assert np.array_equal(before, session.canvas.image) and person.all("#picture .pixels")
    person.click("#scene")
    person.until(lambda: session.canvas and not np.array_equal(person.shown(), before))
    before = person.shown()  # scene 4, by day

    person.click("#advanced button")
    person.click("#keep input")
    person.say("make it night")  # a stroke with the brush, then a box beside it
    person.drag((8, 8), (8, 56))
    person.click("[data-tool=box]")
    person.drag((16, 0), (32, 64))
    person.click("#go")
    person.until(lambda: person.told.startswith("Edit 1: make it night, where you painted"))
    mask = np.array(session.canvas.state.mask)
    assert mask[:, 17:31].all() and mask[8:56, 6:10].all() and not mask[:, 34:].any() and not mask[:2, :14].any()
    after = person.until(lambda: np.array_equal(person.shown(), session.canvas.image) and person.shown())
    change = abs(np.array(after).astype(int) - np.array(before)).mean((0, 2))
    assert change[20:28].min() > 10 and change[34:].max() == 0
    assert len(person.all("#edits .state")) == 2
    assert not person.driver.execute_script("return document.querySelector('#picture canvas').dataset.touched")

    person.click("#undo")
    person.until(lambda: np.array_equal(person.shown(), before))
    person.click("[data-tool=clear]")  # else the paint of the edit that was undone would count
    person.click("#examples .gallery-item", -1)
    person.until(lambda: person.all("textarea")[0].get_attribute("value") == session.suggestions()[-1])
    person.all("textarea")[0].send_keys("\n")
    person.until(lambda: person.told.startswith("Edit 2: ") and "everywhere" in person.told)
    person.until(lambda: len(person.all("#edits .state")) == 3)
    person.click("#edits [data-state='1']")
    person.until(lambda: person.told.startswith("At 1, make it night"))
    assert session.canvas.at == 1 and [s.parent for s in session.canvas.states] == [None, 0, 0]

    picture = person.download("#save-picture")
    assert picture.name == f"{session.name}_1.png" and np.array_equal(Image.open(picture), after)
    assert Image.open(person.download("#save-strip")).height > 256
    canvas = emilie_min.open(person.download("#save-canvas"), editor)
    assert canvas.at == 1 and np.array_equal(canvas.image, after) and len(canvas.states) == 3


@in_browser
def test_keys_a_small_window_the_dark_and_the_picture_before(person):
    from selenium.webdriver.common.keys import Keys

    driver, session = person.driver, person.visit()
    try:
        emulate = driver.execute_cdp_cmd
        emulate("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
        size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        emulate("Emulation.setDeviceMetricsOverride", size)
        session = person.visit()
        assert driver.execute_script("return document.documentElement.scrollWidth") == 360
        dark = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", dark)[:3])) < 60
        person.say("make it night")
        person.all("textarea")[0].send_keys(Keys.CONTROL, Keys.ENTER)
        person.until(lambda: person.told.startswith("Edit 1"))
        assert driver.execute_script("return document.documentElement.scrollWidth") == 360
        clip = "return getComputedStyle(document.querySelector('.before')).clipPath"
        assert driver.execute_script(clip) == "inset(0px 100% 0px 0px)"
        driver.execute_script(
            "const r = document.querySelector('[data-compare]'); r.value = 40;"
            "r.dispatchEvent(new Event('input', {bubbles: true}))"
        )
        assert driver.execute_script(clip) == "inset(0px 60% 0px 0px)"
        driver.execute_script("document.activeElement.blur()")
        for keys, at in (("z", 0), ("y", 1)):
            driver.find_element("css selector", "body").send_keys(Keys.CONTROL, keys)
            person.until(lambda at=at: session.canvas.at == at and f"At {at}" in person.told)
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@in_browser
def test_what_goes_wrong_is_told_on_the_page_and_harms_nothing(person, tmp_path):
    session = person.visit()
    canvas, before = session.canvas, person.shown()
    broken = tmp_path / "<img src=x onerror=document.title=1>.png"
    broken.write_bytes(b"\x89PNG\r\n")
    person.upload(broken)
    person.until(lambda: f"{broken.name} cannot be read as a picture" in person.told)
    person.say("make it winter <b> ${document.title=2}")
    person.click("#go")
    person.until(lambda: "does not know 'winter', '<b>', '${document'" in person.told)
    person.say("make it night")
    person.click("[data-tool=erase]")
    person.drag((8, 8), (8, 56))
    person.click("#go")
    person.until(lambda: "nothing is painted" in person.told)
    assert person.driver.title == "EMILIE studio"
    assert session.canvas is canvas and len(canvas.states) == 1
    assert np.array_equal(person.shown(), before) and len(person.all("#edits .state")) == 1

    world.render(world.scene(5)).resize((96, 64)).save(tmp_path / "photo.png")
    person.upload(tmp_path / "photo.png")
    person.until(lambda: person.told.startswith("photo.png is open. It is no scene"))
    assert person.until(lambda: person.shown().size == session.canvas.image.size)


@in_browser
def test_a_second_visitor_waits_and_a_closed_page_is_forgotten(person, page, monkeypatch):
    steps, both_asked, log = Canvas.steps, threading.Event(), []

    def watched(self, *args, **kwargs):
        log.append("begins")
        assert both_asked.wait(120)
        time.sleep(0.5)  # time for another to begin, if it could
        yield from steps(self, *args, **kwargs)
        log.append("ends")

    monkeypatch.setattr(Canvas, "steps", watched)
    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")  # a closed page is then forgotten in a second, not in an hour
    driver = person.driver
    first = person.visit()
    person.say("make it night")
    person.click("#go")
    person.until(lambda: log == ["begins"])
    person.click("#edits .state")  # on the same page nothing else happens meanwhile
    person.until(lambda: "an edit is under way" in person.told)
    driver.switch_to.new_window("tab")
    known = len(page.visitors)
    driver.get(page.url)  # a second visitor's first picture waits too: the networks are busy
    person.until(lambda: "queue" in person.all("#picture")[0].text)
    assert log == ["begins"] and not person.all("#edits .state")
    both_asked.set()
    person.until(lambda: person.all("#edits .state"))
    assert len(page.visitors) == known + 1
    key = list(page.visitors)[-1]
    person.say("make it day")
    person.click("#go")
    person.until(lambda: len(page.visitors[key].canvas.states) == 2)
    assert log == ["begins", "ends"] * 2
    assert first.canvas is not page.visitors[key].canvas and first.canvas.state.instruction == "make it night"

    driver.close()
    driver.switch_to.window(driver.window_handles[0])
    person.until(lambda: key not in page.visitors)
    assert first in page.visitors.values()


@in_browser
def test_the_page_asks_nothing_of_any_other_computer(person, page):
    person.visit()
    events = [json.loads(entry["message"])["message"] for entry in person.driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    own = (page.url, "data:", "blob:", "chrome:", "chrome-untrusted:")  # chrome: the browser's own first tab
    assert len(urls) > 10 and [url for url in urls if not url.startswith(own)] == []
    errors = [e for e in person.driver.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []


@in_browser
def test_a_person_hides_weakens_drags_and_takes_out_edits(person):
    session = person.visit()
    for n, text in enumerate(("make it night", "make it day"), 1):
        person.say(text)
        person.click("#go")
        person.until(lambda n=n: len(person.all("#stack .layer")) == n)
    canvas, before = session.canvas, session.canvas.latent
    person.click("#stack [data-change=hide]")
    person.until(lambda: person.all("#stack .layer.hidden") and "hide edit 1" in person.told)
    assert [state.shown for state in canvas.stack] == [False, True]
    person.click("#stack [data-change=show]")
    person.until(lambda: not person.all("#stack .layer.hidden") and "no network call" in person.told)
    assert (canvas.latent == before).all()
    slide = "const s = document.querySelectorAll('#stack input')[1]; s.value = 0.5; "
    person.driver.execute_script(slide + "s.dispatchEvent(new Event('change', {bubbles: true}))")
    person.until(lambda: canvas.state.strength == 0.5 and "strength edit 2" in person.told)
    drag = """const [a, b] = document.querySelectorAll('#stack .layer'), dataTransfer = new DataTransfer();
        for (const [on, type] of [[b, 'dragstart'], [a, 'dragover'], [a, 'drop']])
            on.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer}));"""
    person.driver.execute_script(drag)
    person.until(lambda: [state.depth for state in canvas.stack] == [1, 0] and "move edit 2" in person.told)
    person.until(lambda: "make it day" in person.all("#stack .layer")[0].text)  # which is shown a moment later
    person.click("#stack [data-change=retract]")
    person.until(lambda: len(person.all("#stack .layer")) == 1)
    assert [state.instruction for state in canvas.stack] == ["make it night"]
    person.click("#undo")
    person.until(lambda: len(person.all("#stack .layer")) == 2)
    person.click("#stack [data-change=revise]")
    person.until(lambda: person.all("#stack .revised") and person.all("#go")[0].text == "Revise edit 1")
    assert person.all("textarea")[0].get_attribute("value") == "make it day"
    person.say("turn it into a comic")
    person.click("#go")
    person.until(lambda: "Edit 1 is made anew" in person.told and person.all("#go")[0].text == "Edit")
    assert [state.instruction for state in canvas.stack] == ["turn it into a comic", "make it night"]


@in_browser
def test_a_person_drops_an_object_and_clicks_a_place(person, tmp_path):
    scene = world.Scene("sand", "day", (world.Object("square", "blue", "top left"),))
    world.render(scene).save(tmp_path / "base.png")
    world.render(world.Scene("sand", "day", (world.Object("star", "pink", "top left"),))).crop((0, 0, 32, 32)).save(
        tmp_path / "kite.png"
    )
    session = person.visit()
    person.upload(tmp_path / "base.png")
    person.until(lambda: "base.png is open" in person.told)
    person.click("#insert button")
    person.until(lambda: person.all("#inset .none"))
    person.all("#inset input[type=file]")[0].send_keys(str(tmp_path / "kite.png"))
    person.until(lambda: 'It shows "a pink star"; 4 places' in person.told)
    person.until(lambda: person.all("#caption input, #caption textarea")[0].get_attribute("value") == "a pink star")
    person.until(lambda: len(person.all("#picture .place")) == 4)
    board, places = person.all("#picture canvas")[0].rect, person.all("#picture .place")
    for place in places:
        x, y, w, h = session.inserting.plan.boxes[int(place.get_attribute("data-place"))]
        assert abs(place.rect["x"] - board["x"] - x * board["width"] / 64) < 2
        assert abs(place.rect["height"] - h * board["height"] / 64) < 2
    asked = session.inserting.plan.instruction(int(places[-1].get_attribute("data-place")))
    places[-1].click()
    person.until(lambda: person.told.startswith(f"Edit 1: {asked}"))
    person.until(lambda: np.array_equal(person.shown(), session.view()) and not person.all("#picture .place"))
    person.click("#undo")
    person.until(lambda: len(person.all("#picture .place")) == 4)
    person.click("[data-tool=box]")  # they are no longer in the way
    assert not person.all("#picture .place")
    person.drag((34, 34), (60, 60))
    person.click("#places")
    person.until(lambda: len(person.all("#picture .place")) == 1 and session.inserting.plan.boxes == [(34, 34, 26, 26)])
    person.click("#away")
    person.until(lambda: person.all("#inset .none") and not person.all("#picture .place"))


def test_what_the_stack_is_asked_is_checked(session):
    list(session.edit("make it night", steps=1))
    at = session.canvas.at
    for asked in (None, {}, {"state": "1"}, {"state": "9", "change": "hide"}, {"state": "1", "change": "forget"},
                  {"state": "9", "change": "revise"}):  # fmt: skip
        with pytest.raises(EmilieError):
            list(change(session, asked))
    assert session.canvas.at == at
    list(change(session, {"state": "1", "change": "retract", "value": "0"}))
    assert session.canvas.stack == [] and stack_html(session) == ""
