"""`emilie studio`: a page on which to edit a picture: paint where, say what, undo, branch, save.

Gradio shows it (an optional extra). `Session` is one visitor's canvas and knows nothing of gradio; `build` lays out the
page. All visitors share the networks, which do one edit at a time. Nothing leaves this computer: no analytics, no share
link, no fonts from elsewhere; uploads lie in a folder that only this user can read, and are removed once they are read.
"""

import atexit
import base64
import contextlib
import importlib.util
import io
import os
import random
import shutil
import socket
import tempfile
import threading
import time
import warnings
import webbrowser
from collections.abc import Callable
from html import escape
from pathlib import Path

from PIL import Image

from ..canvas.canvas import Canvas, check_can_edit
from ..canvas.canvas import open as open_canvas
from ..canvas.settings import GATES
from ..canvas.strip import OUTLINE, enlarge, strip
from ..emilie import Editor
from ..errors import CanvasError, EmilieError, MaskError
from ..toy import judge, world

SHOWN, THUMB = 512, 88  # px: up to where a small picture is shown enlarged; the height of those in the tree of edits
KEPT = 600  # seconds for which a closed page's canvas is kept, in case only the connection broke
SAVES = ("picture", "strip", "canvas")
TOOLS = """<div class="tools">
  <button data-tool="brush" title="Paint where to edit">Brush</button>
  <button data-tool="box" title="Drag a box where to edit">Box</button>
  <button data-tool="erase" title="Take paint away">Eraser</button>
  <input type="range" min="2" max="50" value="14" title="Size of brush and eraser">
  <button data-tool="clear" title="No paint: edit everywhere">Clear</button>
  <span>Paint where to edit; without paint, everywhere.</span>
</div>"""


class Session:
    """One visitor's canvas. What is done is told in a line; what cannot be is an EmilieError and changes nothing."""

    def __init__(self, editor: Editor, folder: str | None = None):
        self.editor, self.folder = editor, folder  # the folder for what can be downloaded; None: the system's
        self.canvas: Canvas | None = None
        self.name = ""  # of the files to download
        self.paint: Image.Image | None = None  # the mask of an edit that was undone, so that it can be tried again
        self.written = ""  # the folder with this moment's files
        self.busy, self.stopped, self.closed = threading.Lock(), False, False

    def open(self, path: str) -> str:
        """Go on with a picture, or with a canvas that was saved (.safetensors)."""
        name = os.path.basename(path)
        try:
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", UserWarning)
                canvas = open_canvas(path, self.editor)
        except EmilieError as error:
            raise type(error)(str(error).replace(path, name)) from error
        self.canvas, self.name, self.paint = canvas, name.split(".")[0], None
        return ". ".join([f"{name} is open", *(str(note.message).replace(path, name) for note in notes)])

    def new_scene(self, seed: int) -> str:
        canvas = open_canvas(world.render(world.scene(seed)), self.editor)
        self.canvas, self.name, self.paint = canvas, f"scene{seed}", None
        return f"Scene {seed} of the small world"

    def edit(self, text: str, paint: str = "", step: Callable[[int], None] | None = None, **settings) -> str:
        """Follow an instruction: everywhere, or where there is paint, see `read_paint`; settings: of `Canvas.edit`.

        step: called with the number of sampling steps done, after each.
        """
        self.stopped, started = False, time.time()

        mask = read_paint(paint)
        settings["keep_background"] = settings.get("keep_background", False) and mask is not None
        for taken in self.opened().steps(text, mask, **settings):
            if self.stopped or self.closed:
                raise CanvasError("stopped: the picture is as it was")
            if step:
                step(taken.i + (taken.sigma > 0))
        self.paint = None
        where = "everywhere" if mask is None else "where you painted"
        return f"Edit {self.canvas.at}: {text}, {where}; {time.time() - started:.1f} s"

    def undo(self) -> str:
        mask = self.opened().state.mask
        self.canvas.undo()
        return self.gone(mask)

    def redo(self) -> str:
        self.opened().redo()
        return self.gone()

    def branch(self, state: int) -> str:
        self.opened().branch(state)
        return self.gone()

    def gone(self, paint: Image.Image | None = None) -> str:
        self.paint = paint
        return f"At {self.canvas.at}, {self.canvas.state.instruction or 'the start'}: the next edit begins here"

    def opened(self) -> Canvas:
        if self.canvas is None:
            raise CanvasError("there is no picture yet: open one")
        return self.canvas

    def suggestions(self) -> list[str]:
        """In the small world: an instruction of every kind that can be followed in the current picture."""
        if not small_world(self.editor) or self.canvas is None:
            return []
        picture, scene, kinds = self.canvas.image, world.Scene("", "", ()), ["background", "style"]
        if picture.size == (world.SIZE, world.SIZE):
            reading = judge.read(picture)
            if reading.background_rms < 3 * judge.MAX_RMS:  # else it is some other picture, without shapes to speak of
                scene, kinds = reading.scene, world.possible(reading.scene)
        return [world.instruct(scene, f"{self.name} {self.canvas.at}", kind)[0] for kind in kinds]

    def files(self) -> list[str]:
        """Paths of what can be downloaded now, in a new folder: the picture, the strip that led to it, the canvas."""
        canvas, stem = self.opened(), f"{self.name}_{self.canvas.at}"
        self.forget()
        self.written = tempfile.mkdtemp(dir=self.folder)
        names = (f"{stem}.png", f"{stem}_strip.png", f"{self.name}.canvas.safetensors")
        picture, row, whole = (os.path.join(self.written, name) for name in names)
        canvas.image.save(picture)
        cells = [(canvas.states[0].image, "input", None)]
        strip(cells + [(s.image, s.instruction, s.mask) for s in canvas.history]).save(row)
        canvas.save(whole)
        return [picture, row, whole]

    def forget(self) -> None:
        if self.written:
            shutil.rmtree(self.written, ignore_errors=True)


class Sessions(dict):
    """The sessions of the pages that are open, by gradio's key for a page."""

    def __init__(self, editor: Editor, folder: str | None = None, kept: float = KEPT):
        super().__init__()
        self.editor, self.folder, self.kept = editor, folder, kept

    def visit(self, key: str) -> Session:
        session = self.setdefault(key, Session(self.editor, self.folder))
        session.closed = False
        return session

    def close(self, key: str) -> None:
        """A page was closed: stop its edit, and drop its canvas and files unless it is back in time."""
        if key in self:
            self[key].closed = True
            timer = threading.Timer(self.kept, self.drop, [key])
            timer.daemon = True
            timer.start()

    def drop(self, key: str) -> None:
        if key in self and self[key].closed:
            self.pop(key).forget()


def small_world(editor: Editor) -> bool:
    return editor.config.sampling.resolution == world.SIZE


def read_paint(url: str) -> Image.Image | None:
    """What the page sends as a mask: a PNG as data URL, opaque where to edit; "" = no mask, None. Raises MaskError."""
    if not url:
        return None
    try:
        mask = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])), formats=["PNG"]).getchannel("A")
    except Exception as error:  # PIL raises whatever its reader meets
        raise MaskError("the painted mask did not arrive whole: paint it again") from error
    if not mask.getbbox():
        raise MaskError("nothing is painted: paint where to edit, or press Clear to edit everywhere")
    return mask


def data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def picture_html(session: Session) -> str:
    """The current picture under a canvas of its size to paint on; a small one in large pixels, a whole number each."""
    if session.canvas is None:
        return '<div class="empty">Open a picture to begin: click here, or drop one</div>'
    image, paint = session.canvas.image, ""
    if session.paint is not None:
        mask = Image.new("RGBA", image.size, OUTLINE)
        mask.putalpha(session.paint)
        paint = data_url(mask)
    times = max(1, SHOWN // max(image.size))
    return (
        f'<div class="board" style="width:{times * image.width}px" data-made="{time.time_ns()}" data-paint="{paint}">'
        f'<img class="{"pixels" if times > 1 else ""}" src="{data_url(image)}" draggable="false" alt="the picture">'
        f'<canvas width="{image.width}" height="{image.height}"></canvas></div>'
    )


def tree_html(canvas: Canvas | None) -> str:
    """The tree of edits, a column for each depth: a state's first edit stays in its row, a branch opens another."""
    if canvas is None:
        return ""
    children = {i: [] for i in range(len(canvas.states))}
    for i, state in enumerate(canvas.states[1:], 1):
        children[state.parent].append(i)
    rows, row, column, parts, todo = 1, {}, {}, [], [0]
    while todo:  # depth first, so that no line crosses another
        i = todo.pop()
        todo += reversed(children[i])
        state, parent = canvas.states[i], canvas.states[i].parent
        rows += i > 0 and i != children[parent][0]
        row[i] = rows
        column[i] = 1 if i == 0 else column[parent] + 1
        if i > 0:
            line = f"grid-area:{row[parent]}/{column[i]}/{row[i] + 1}/{column[i] + 1}"
            parts.append(f'<i class="{"branch" if row[i] > row[parent] else ""}" style="{line}"></i>')
        about = ", ".join(f"{key} {value}" for key, value in state.settings.items())
        parts.append(
            f'<button class="state{" here" if i == canvas.at else ""}" data-state="{i}" title="{escape(about)}" '
            f'style="grid-area:{row[i]}/{column[i]}"><img src="{data_url(enlarge(state.image, THUMB))}" alt="">'
            f"<span><b>{i}</b> {escape(state.instruction or 'start')}</span></button>"
        )
    return f'<div class="tree">{"".join(parts)}</div>'


def build(editor: Editor):
    """The page as gradio's Blocks, with its visitors' `sessions`. Raises CheckpointError where weights cannot edit."""
    check_can_edit(editor)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    os.environ["GRADIO_TEMP_DIR"] = folder = tempfile.mkdtemp(prefix="emilie-studio-")  # for this user's eyes only
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    import gradio as gr

    sessions, defaults = Sessions(editor, folder), editor.config.sampling
    small, words = small_world(editor), editor.text.config.words

    def button(told: str, **more):
        return gr.Button(told, size="sm", min_width=70, elem_id=told.split()[-1].lower(), **more)

    def scale(default: float, label: str, info: str):
        return gr.Slider(0, 2 * default, default, label=label, info=info)

    with gr.Blocks(title="EMILIE studio", analytics_enabled=False) as page:
        page.sessions = sessions
        gr.HTML("<b>EMILIE studio</b> one instruction after another, anywhere or where you paint", elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                picture = gr.HTML(
                    html_template=TOOLS + "${value}", js_on_load="studio.board(element)", elem_id="picture"
                )
                with gr.Row():
                    undo, redo, scene = button("Undo"), button("Redo"), button("New scene", visible=small)
                    upload = gr.UploadButton("Open picture or canvas", size="sm", min_width=160, elem_id="open")
                with gr.Row():
                    saves = [gr.DownloadButton(f"Save {x}", size="sm", elem_id=f"save-{x}") for x in SAVES]
            with gr.Column(scale=4, min_width=320):
                text = gr.Textbox(label="What to change?", placeholder="make it night", max_lines=3, autofocus=True)
                with gr.Row():
                    go = gr.Button("Edit", variant="primary", scale=3, elem_id="go")
                    stop = gr.Button("Stop", scale=1, min_width=60, elem_id="stop")
                status = gr.HTML(elem_id="status")
                examples = gr.Dataset(
                    label="For this picture", components=[text], samples=[[""]], visible=small, elem_id="examples"
                )
                if words:
                    gr.HTML(f"<details class=words><summary>The words it knows</summary>{' '.join(words)}</details>")
                told = "Nothing happens? Raise it. Colours glare, or other things change too? Lower it."
                text_scale = scale(defaults.text_scale, "How strongly to follow the instruction", told)
                told = "Too much changes? Raise it. Too little? Lower it."
                image_scale = scale(defaults.image_scale, "How closely to stay with the picture", told)
                with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                    steps = gr.Slider(1, 100, defaults.steps, step=1, label="Steps", info="More is slower and finer.")
                    told = "Another number, another result. Empty: the canvas's own."
                    seed = gr.Number(label="Seed", precision=0, info=told)
                    told = "anchor: what is outside stays. guidance: steers inside only. eq8: leaves noise outside."
                    gate = gr.Radio(list(GATES), value=GATES[0], label="What the paint does (gate)", info=told)
                    keep = gr.Checkbox(label="Outside the paint keep every pixel, to the bit", elem_id="keep")
        tree = gr.HTML(js_on_load="studio.tree(element, trigger)", elem_id="edits")
        paint = gr.Textbox(visible=False)
        shown = [status, picture, tree, undo, redo, examples, *saves]

        def act(request: gr.Request, do: Callable[[Session], str]) -> list:
            """Do something to a visitor's session, one thing at a time, and show what it is then, or why not."""
            session = sessions.visit(request.session_hash)
            if not session.busy.acquire(blocking=False):
                return refused("an edit is under way: wait for it, or press Stop")
            try:
                note, canvas = do(session), session.canvas
                return [
                    f"<p>{escape(note)}</p>",
                    picture_html(session),
                    tree_html(canvas),
                    gr.update(interactive=canvas is not None and canvas.at > 0),
                    gr.update(interactive=canvas is not None and bool(canvas.redo_stack)),
                    gr.Dataset(samples=[[text] for text in session.suggestions()]),
                    *(session.files() if canvas else [None] * len(saves)),
                ]
            except EmilieError as error:
                return refused(str(error))
            finally:
                session.busy.release()

        def refused(why: str) -> list:
            return [f'<p class="refused">{escape(why)}</p>', *[gr.skip()] * (len(shown) - 1)]

        def doing(do: Callable[[Session], str]) -> Callable:
            def handler(request: gr.Request):
                return act(request, do)

            return handler

        def edit(text, paint, text_scale, image_scale, steps, seed, gate, keep, request: gr.Request, bar=gr.Progress()):  # noqa: B008
            settings = dict(text_scale=text_scale, image_scale=image_scale, steps=steps, seed=seed, gate=gate)
            settings |= dict(step=lambda done: bar((done, steps), desc=text, unit="steps"), keep_background=keep)
            return act(request, lambda session: session.edit(text, paint, **settings))

        def opened(path, request: gr.Request):
            try:
                return act(request, lambda session: session.open(str(path)))
            finally:
                Path(path).unlink(missing_ok=True)

        def went(event: gr.EventData, request: gr.Request):
            return act(request, lambda session: session.branch(int(event._data["state"])))

        def halted(request: gr.Request):
            sessions.visit(request.session_hash).stopped = True

        def closed(request: gr.Request):
            sessions.close(request.session_hash)

        new_scene = doing(lambda session: session.new_scene(random.randrange(10**6)))
        quick = dict(outputs=shown, concurrency_limit=None, show_progress="hidden", api_visibility="private")
        slow = dict(outputs=shown, concurrency_id="networks", concurrency_limit=1, api_visibility="private")
        slow |= dict(show_progress_on=picture)
        unseen = dict(queue=False, show_progress="hidden", api_visibility="private")
        sent = [text, paint, text_scale, image_scale, steps, seed, gate, keep]
        page.load(new_scene if small else doing(lambda session: ""), **slow)
        page.unload(closed)
        gr.on([go.click, text.submit], edit, sent, js="(...inputs) => studio.inputs(...inputs)", **slow)
        scene.click(new_scene, **slow)
        upload.upload(opened, upload, **slow)
        undo.click(doing(Session.undo), **quick)
        redo.click(doing(Session.redo), **quick)
        tree.select(went, **quick)
        stop.click(halted, **unseen)
        examples.click(lambda sample: sample[0], examples, text, **unseen)
    return page.queue(api_open=False)


def serve(editor: Editor):
    """The page, see `build`, and the uvicorn.Server for it: `run(sockets=[listen(...)])`, until its `should_exit`."""
    import fastapi
    import gradio as gr
    import uvicorn

    here, page = Path(__file__), build(editor)
    looks = gr.themes.Base(primary_hue="pink", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = gr.mount_gradio_app(  # and not launch(), which may want a proxy or a share link to find its own page
        fastapi.FastAPI(),
        page,
        path="/",
        footer_links=[],
        ssr_mode=False,
        theme=looks.set(block_info_text_color="*neutral_600", slider_color="*primary_500"),
        head=f"<script>{here.with_suffix('.js').read_text('utf-8')}</script>",
        css=here.with_suffix(".css").read_text("utf-8"),
    )
    return page, uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))


def listen(host: str = "127.0.0.1", port: int = 7860) -> socket.socket:
    """Take a port for the page, 0 = any. Raises EmilieError where it is taken, and where gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise EmilieError("the page needs gradio: pip install 'emilie_min[studio]'")
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        why = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise EmilieError(f"cannot serve on {host}:{port}: {why}; choose another --port") from error


def studio(editor: Editor, host: str = "127.0.0.1", port: int = 7860, open_browser: bool = False) -> None:
    """Serve the page until interrupted. Raises EmilieError, see `listen` and `build`."""
    listener = listen(host, port)
    url = f"http://{host}:{listener.getsockname()[1]}/"
    _, server = serve(editor)
    if host not in ("127.0.0.1", "localhost"):
        warnings.warn(f"everybody who can reach {url} can use the page", stacklevel=2)
    print(f"the studio is at {url} (stop it with Ctrl-C)", flush=True)
    if open_browser:
        threading.Timer(1, webbrowser.open, [url]).start()
    with contextlib.suppress(KeyboardInterrupt), listener:
        server.run(sockets=[listener])
