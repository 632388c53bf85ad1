"""The studio's page as gradio lays it out, and what its buttons do to a `Visitor`.

A visitor is the page's gr.State: gradio keeps it while the page is open, and for an hour after its last event where
only the connection broke. `page.visitors` finds it by its key while it lives, for what `door` sends, fetches, stops.
"""

import math
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from inspect import Parameter, Signature
from types import SimpleNamespace
from weakref import WeakValueDictionary

import gradio as gr
from gradio.state_holder import SessionState

from ..canvas.canvas import check_can_edit
from ..canvas.settings import GATES, as_int
from ..emilie import Editor
from ..errors import CanvasError, EmilieError
from .inserting import PROPOSALS, Networks
from .layers import change, stack_html
from .options import small_world
from .visitor import Told, Visitor, data_url, inset_html, picture_html, tree_html

PAGES, WAITING = 256, 20  # visitors that are kept; events that may wait
UNHEARD = 64  # messages that a page may leave unheard, which hold pictures
FAILED = "this failed here, and the picture is as it was: try something else"
SENT = ("text_scale", "image_scale", "steps", "seed", "gate", "negative")  # of an edit's settings
TOOLS = """<div class="tools">
  <button data-tool="brush" title="Paint where to edit">Brush</button>
  <button data-tool="box" title="Drag a box where to edit">Box</button>
  <button data-tool="erase" title="Take paint away">Eraser</button>
  <input type="range" min="2" max="50" value="14" title="Size of brush and eraser">
  <button data-tool="clear" title="No paint: edit everywhere">Clear</button>
  <button data-tool="open" title="A picture, or a canvas that was saved">Open ...</button><input type="file" hidden>
  <span>Paint where to edit; without paint, everywhere.</span>
</div>"""
INSET = """<div class="tools">
  <button data-file="select" title="A picture of an object, cut out or not">Inset ...</button>
  <button data-file="upload" title="Where the object is, white on black, if it is not cut out">Its mask ...</button>
  <input type="file" hidden><span>Or paint a place for it, and press Propose places.</span>
</div>"""


def build(editor: Editor, networks: Networks | None = None) -> gr.Blocks:
    """The page, with its `visitors` by their keys. Raises CheckpointError where weights cannot edit."""
    check_can_edit(editor)
    networks = networks or Networks(editor)
    with gr.Blocks(title="EMILIE studio", analytics_enabled=False) as page:
        page.visitors = WeakValueDictionary()
        on = layout(editor)
        connect(page, editor, networks, on)
        endpoints(page, editor, networks, on)
    return page.queue(max_size=WAITING, api_open=False)


class Pages:
    """The pages that gradio keeps, by their sessions' names. One that is open never goes to make room for another."""

    def __init__(self, page: gr.Blocks):
        self.page, self.listening = page, Counter()

    @contextmanager
    def opened(self, session: str) -> Iterator[None]:
        """While a page listens to what it is told."""
        self.listening[session] += 1
        try:
            yield
        finally:
            self.listening[session] -= 1
            self.listening += Counter()  # without those of 0

    def admit(self, session: str) -> str:
        """Make room for a page's event. -> why there is none, or ""."""
        queue, kept = self.page._queue, self.page.state_holder.session_data
        unheard = queue.pending_messages_per_session.get(session)
        if unheard is not None and unheard.qsize() > UNHEARD:
            return "this page does not listen to what it is told"
        if session in kept:
            return ""
        if len(kept) >= PAGES:
            old = next((old for old in kept if old not in self.listening), None)
            if old is None:
                return "too many pages are open here: come back later"
            for one in (kept, queue.pending_messages_per_session, queue.pending_event_ids_session):
                one.pop(old, None)
        kept[session] = Forgetful(self.page)
        return ""


class Forgetful(SessionState):
    """What gradio keeps of a page, without what the last events brought, each up to 32 MB, and gave."""

    def _update_value_in_config(self, key: int, value: object) -> None:
        pass


def layout(editor: Editor) -> SimpleNamespace:
    """What is on the page, by name."""
    on, defaults = SimpleNamespace(), editor.config.sampling
    small, words = small_world(editor), editor.text.config.words

    def button(told: str, name: str = "", **more) -> gr.Button:
        return gr.Button(told, size="sm", min_width=70, elem_id=name or told.split()[-1].lower(), **more)

    def scale(default: float, label: str, info: str) -> gr.Slider:
        return gr.Slider(0, 2 * default, default, label=label, info=info)

    on.visitor = gr.State()
    gr.HTML("<b>EMILIE studio</b> one instruction after another, anywhere or where you paint", elem_id="head")
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            on.picture = gr.HTML(
                html_template=TOOLS + "${value}", js_on_load="studio.board(element, trigger)", elem_id="picture"
            )
            with gr.Row():
                on.undo, on.redo, on.scene = button("Undo"), button("Redo"), button("New scene", visible=small)
        with gr.Column(scale=4, min_width=320):
            on.text = gr.Textbox(label="What to change?", placeholder="make it night", max_lines=3, autofocus=True)
            with gr.Row():
                on.go = gr.Button("Edit", variant="primary", scale=3, elem_id="go")
                on.stop = gr.Button("Stop", scale=1, min_width=60, elem_id="stop")
            with gr.Row(elem_id="more"):
                on.where, on.scales = button("Show where", "where"), button("Try scales", "scales")
                on.region, on.clear = button("Add region", "region"), button("Drop regions", "forget")
            on.status = gr.HTML(elem_id="status")
            on.examples = gr.Dataset(label="For this picture", components=[on.text], samples=[[""]], elem_id="examples")
            if words:
                gr.HTML(f"<details class=words><summary>The words it knows</summary>{' '.join(words)}</details>")
            usual = defaults.text_scale
            told = f"Nothing happens? Raise it. Colours glare, other things change? Lower it. Usual: {usual:g}."
            on.text_scale = scale(defaults.text_scale, "How strongly to follow the instruction (text scale)", told)
            told = f"Too much changes? Raise it. Too little? Lower it. Usual: {defaults.image_scale:g}."
            on.image_scale = scale(defaults.image_scale, "How closely to stay with the picture (image scale)", told)
            told = "For something small in a large photo. What is outside the paint stays, to the bit."
            on.crop = gr.Checkbox(label="In a crop round the paint, at full resolution", info=told, elem_id="crop")
            with gr.Accordion("Insert an object from another picture", open=False, elem_id="insert"):
                on.inset = gr.HTML(
                    html_template=INSET + "${value}", js_on_load="studio.inset(element, trigger)", elem_id="inset"
                )
                told = "Empty: BLIP-2 says it."
                on.caption = gr.Textbox(label="Caption: what it is", info=told, max_lines=1, elem_id="caption")
                with gr.Row():
                    on.places, on.away = button("Propose places", "places"), button("Put away", "away")
                told = "1: a new object, by its caption. Less: the inset itself, redrawn so that light and edges fit."
                on.redrawn = gr.Slider(0.05, 1, 1, step=0.01, label="How much of it is drawn anew", info=told)
            with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                on.steps = gr.Slider(1, 100, defaults.steps, step=1, label="Steps", info="More is slower and finer.")
                told = "An instruction whose pull is taken off. Empty: nothing."
                on.negative = gr.Textbox(label="What not to do", info=told, max_lines=1, elem_id="negative")
                told = "Another number, another result. Empty: the canvas's own."
                on.seed = gr.Number(label="Seed", precision=0, info=told)
                told = "anchor: what is outside stays. guidance: steers inside only. eq8: leaves noise outside."
                on.gate = gr.Radio(list(GATES), value=GATES[0], label="What the paint does (gate)", info=told)
                told = (
                    "Of an edit that is revised: 1 is all of it, less goes on from its steps, and only scales, gate, "
                )
                told += "paint and words can change then."
                on.part = gr.Slider(0, 1, 1, step=0.05, label="Which part of the steps to redo", info=told)
                on.keep = gr.Checkbox(label="Outside the paint keep every pixel, to the bit", elem_id="keep")
    on.stack = gr.HTML(js_on_load="layers.strip(element, trigger)", elem_id="stack")
    on.tree = gr.HTML(js_on_load="studio.tree(element, trigger)", elem_id="edits")
    on.paint = gr.Textbox(visible=False)
    return on


def connect(page: gr.Blocks, editor: Editor, networks: Networks, on: SimpleNamespace) -> None:
    """What happens at a click. The networks do one thing at a time; who waits is told his place."""
    fields = {"text": on.text, "keep_background": on.keep, **{name: getattr(on, name) for name in SENT}}
    shown = [on.visitor, on.status, on.picture, on.tree, on.stack, on.undo, on.redo, on.examples, on.inset, on.caption]
    shown += [on.go, *fields.values()]

    def doing(do: Callable[..., str | Iterator[Told]]) -> Callable:
        """A handler: do one thing at a time with a visitor's canvas; show how it goes, and what it is then."""

        def handler(visitor: Visitor | None, *inputs) -> Iterator[list]:
            visitor = visitor or Visitor(editor, networks, page.visitors)
            page.visitors[visitor.key] = visitor
            if not visitor.busy.acquire(blocking=False):
                yield told(visitor, "an edit is under way: wait for it, or press Stop", refused=True)
                return
            try:
                notes = do(visitor, *inputs)
                for note, done, seen in [(notes, 1, None)] if isinstance(notes, str) else notes:
                    if done < 1:
                        yield told(visitor, note, done, seen=seen)
                yield [visitor, *show(visitor, note)]
            except EmilieError as error:
                yield told(visitor, str(error), refused=True)
            except Exception:  # of one visitor's edit; the page and the others go on
                traceback.print_exc()
                yield told(visitor, FAILED, refused=True)
            finally:
                visitor.busy.release()

        return handler

    def told(visitor: Visitor, note: str, done: float | None = None, refused: bool = False, seen=None) -> list:
        bar = "" if done is None else f'<progress value="{done}"></progress>'
        if seen is not None:
            visitor.seen = data_url(seen)
        if done is not None and visitor.seen:
            bar += f'<img class="seen" src="{visitor.seen}" alt="how it looks so far">'
        line = f'<p class="{"refused" if refused else ""}">{escape(note)}</p>{bar}'
        return [visitor, line, *[gr.skip()] * (len(shown) - 2)]

    def show(visitor: Visitor, note: str) -> list:
        canvas, k, caption = visitor.canvas, visitor.revised, visitor.inserting.told
        (filled, visitor.filled), visitor.inserting.told = (visitor.filled or {}, None), None
        return [
            f"<p>{escape(note)}</p>",
            picture_html(visitor),
            tree_html(canvas),
            stack_html(visitor),
            gr.update(interactive=canvas is not None and canvas.at > 0),
            gr.update(interactive=canvas is not None and bool(canvas.redo_stack)),
            gr.Dataset(samples=[[text] for text in visitor.suggestions()]),
            inset_html(visitor),
            gr.skip() if caption is None else caption,
            gr.update(value="Edit" if k is None else f"Revise edit {k}"),
            *(filled.get(name) if filled else gr.skip() for name in fields),
        ]

    def edit(visitor: Visitor, text: str | None, paint: str | None, keep: bool, crop: bool, *settings) -> Iterator:
        given = dict(zip((*SENT, "part"), settings))
        return visitor.edit(text or "", paint or "", crop, keep_background=keep, **given)

    def try_scales(visitor: Visitor, text: str | None, paint: str | None, keep: bool, _, *settings) -> Iterator:
        return visitor.try_scales(text or "", paint or "", keep_background=keep, **dict(zip(SENT, settings)))

    def region(visitor: Visitor, text: str | None, paint: str | None, _keep, _crop, *settings) -> str:
        return visitor.add_region(text or "", paint or "", **dict(zip(SENT, settings)))

    def unless_stopped(do: Callable, visitor: Visitor | None, event: gr.EventData, *inputs) -> Iterator[list]:
        if visitor and (event._data or {}).get("asked", math.inf) < visitor.stopped_at:
            yield told(visitor, "stopped before it began: the picture is as it was", refused=True)
        else:
            yield from doing(do)(visitor, *inputs)

    def edited(visitor: Visitor | None, event: gr.EventData, *inputs) -> Iterator[list]:
        yield from unless_stopped(edit, visitor, event, *inputs)

    def inserted(visitor: Visitor | None, event: gr.EventData, *inputs) -> Iterator[list]:
        def insert(visitor: Visitor, caption: str | None, redrawn: float, keep: bool, *settings) -> Iterator:
            more = dict(zip(SENT, settings))
            return visitor.insert(clicked(event), caption or "", redrawn, keep_background=keep, **more)

        yield from unless_stopped(insert, visitor, event, *inputs)

    def went(visitor: Visitor | None, event: gr.EventData) -> Iterator[list]:
        yield from doing(lambda visitor: visitor.branch(clicked(event)))(visitor)

    def restacked(visitor: Visitor | None, event: gr.EventData) -> Iterator[list]:
        yield from doing(lambda visitor: change(visitor, event._data))(visitor)

    def clicked(event: gr.EventData) -> int:
        if "state" not in event._data:
            raise CanvasError("a click says where")
        return int(event._data["state"])

    def example(visitor: Visitor | None, number: int) -> str:
        texts = visitor.suggestions() if visitor else []
        return texts[number] if 0 <= number < len(texts) else gr.skip()

    new_scene = doing(lambda visitor: visitor.new_scene(random.randrange(10**6)))
    common = dict(inputs=on.visitor, outputs=shown, api_visibility="private", preprocess=False)  # `Settings` checks
    quick = common | dict(concurrency_limit=None, show_progress="hidden")
    slow = common | dict(concurrency_id="networks", concurrency_limit=1, show_progress_on=on.picture)
    page.load(new_scene if small_world(editor) else doing(lambda visitor: ""), **slow)
    inputs = [on.visitor, on.text, on.paint, on.keep, on.crop, *(getattr(on, name) for name in SENT), on.part]
    asked = slow | dict(inputs=inputs, js="(...inputs) => studio.inputs(...inputs)")
    gr.on([on.go.click, on.text.submit], edited, **asked)
    on.scene.click(new_scene, **slow)
    on.picture.select(doing(Visitor.open_uploaded), **slow)
    on.undo.click(doing(Visitor.undo), **quick)
    on.redo.click(doing(Visitor.redo), **quick)
    on.tree.select(went, **quick)
    on.stack.select(restacked, **slow)
    on.stop.click(None, js="() => studio.stop()")
    on.examples.click(example, **quick | dict(inputs=[on.visitor, on.examples], outputs=on.text))
    on.scales.click(doing(try_scales), **asked)
    on.where.click(doing(lambda visitor, text: visitor.where(text or "")), **slow | dict(inputs=[on.visitor, on.text]))
    on.region.click(doing(region), **quick | dict(inputs=inputs, js="(...inputs) => studio.inputs(...inputs)"))
    on.clear.click(doing(Visitor.clear_regions), **quick)
    captioned = slow | dict(inputs=[on.visitor, on.caption])
    on.inset.select(doing(lambda visitor, caption: visitor.drop_uploaded(caption or "")), **captioned)
    on.inset.upload(doing(lambda visitor, caption: visitor.mask_uploaded(caption or "")), **captioned)
    propose = doing(lambda visitor, caption, paint: visitor.propose(caption or "", paint or ""))
    asked = slow | dict(inputs=[on.visitor, on.caption, on.paint], js="(...inputs) => studio.inputs(...inputs)")
    on.places.click(propose, **asked)
    on.away.click(doing(Visitor.clear_inset), **quick)
    inputs = [on.visitor, on.caption, on.redrawn, on.keep, *(getattr(on, name) for name in SENT)]
    on.picture.click(inserted, **slow | dict(inputs=inputs))


def endpoints(page: gr.Blocks, editor: Editor, networks: Networks, on: SimpleNamespace) -> None:
    """What a script can ask for by name, see README.md beside this; pictures and masks are texts, PNGs as data URLs."""
    status, picture = gr.Textbox(visible=False, label="status"), gr.Textbox(visible=False, label="picture")

    def text(label: str) -> gr.Textbox:
        return gr.Textbox(visible=False, label=label)

    def found(visitor: Visitor) -> str:
        return "" if visitor.paint is None else data_url(visitor.paint)

    def endpoint(name: str, do: Callable, inputs: list, about: str, shown: Callable = Visitor.shown) -> None:
        def handler(visitor: Visitor | None, *given) -> tuple:
            visitor = visitor or Visitor(editor, networks, page.visitors)
            page.visitors[visitor.key] = visitor
            if not visitor.busy.acquire(blocking=False):
                raise gr.Error("an edit is under way: wait for it", print_exception=False)
            try:
                notes = do(visitor, *given)
                note = notes if isinstance(notes, str) else [note for note, _, _ in notes][-1]
                return visitor, note, shown(visitor)
            except EmilieError as error:
                raise gr.Error(str(error), print_exception=False) from error
            except Exception as error:
                traceback.print_exc()
                raise gr.Error(FAILED, print_exception=False) from error
            finally:
                visitor.busy.release()

        kind, needed = Parameter.POSITIONAL_OR_KEYWORD, ("instruction", "state")
        given = [
            Parameter(c.label, kind, default=Parameter.empty if c.label in needed else c.value) for c in inputs
        ]  # by which names a script gives them
        handler.__signature__ = Signature([Parameter("visitor", kind), *given])
        more = dict(api_name=name, api_description=about, concurrency_id="networks", concurrency_limit=1,
                    preprocess=False, api_visibility="public")  # fmt: skip
        outputs = [on.visitor, status, picture]
        gr.Button(visible=False).click(handler, [on.visitor, *inputs], outputs, **more)

    defaults = editor.config.sampling
    settings = [
        gr.Checkbox(False, visible=False, label="keep_background"),
        gr.Checkbox(False, visible=False, label="crop"),
        gr.Number(defaults.text_scale, visible=False, label="text_scale"),
        gr.Number(defaults.image_scale, visible=False, label="image_scale"),
        gr.Number(defaults.steps, visible=False, label="steps", precision=0),
        gr.Number(None, visible=False, label="seed", precision=0),
        gr.Radio(list(GATES), value=GATES[0], visible=False, label="gate"),
        gr.Textbox("", visible=False, label="negative"),
    ]

    def edit(visitor: Visitor, instruction: str, mask: str | None, keep: bool, crop: bool, *given) -> Iterator[Told]:
        return visitor.edit(instruction or "", mask or "", crop, keep_background=keep, **dict(zip(SENT, given)))

    def insert(visitor: Visitor, take: int, caption: str | None, redrawn: float, keep: bool, *given) -> Iterator[Told]:
        more = dict(zip(SENT, given))
        return visitor.insert(as_int(take, "take") - 1, caption or "", redrawn, keep_background=keep, **more)

    number = gr.Number(0, visible=False, label="state", precision=0)
    what = "Begin with a picture; without one, with the file that was posted, which may be a saved canvas."
    endpoint("open", Visitor.open_url, [gr.Textbox("", visible=False, label="picture")], what)
    what = "In the place of the picture this client's key: POST /open/KEY?name=NAME takes a file, see README.md."
    endpoint("key", lambda visitor: "Files come and go with this key", [], what, lambda visitor: visitor.key)
    what = "Follow an instruction, everywhere or where the mask, of the working picture's size, is opaque."
    endpoint("edit", edit, [text("instruction"), gr.Textbox("", visible=False, label="mask"), *settings], what)
    what = "Where an instruction would act: the mask stands in the place of the picture, none for everywhere."
    endpoint("where", lambda visitor, text: visitor.where(text or ""), [text("instruction")], what, found)
    texts = [gr.Textbox("", visible=False, label=name) for name in ("inset", "inset_mask", "caption", "place")]
    numbers = [gr.Number(n, visible=False, label=x, precision=0) for n, x in ((PROPOSALS, "proposals"), (None, "seed"))]
    what = "Where an inset, or the file that was posted, could go: outlined in the picture. place: a mask, to say so."
    endpoint("propose", Visitor.propose_url, [*texts, *numbers], what, Visitor.outlined)
    given = [gr.Number(1, visible=False, label="take", precision=0), gr.Textbox("", visible=False, label="caption")]
    given += [gr.Slider(0, 1, 1, visible=False, label="redrawn"), settings[0], *settings[2:]]
    endpoint("insert", insert, given, "Draw the inset in one of the places that were proposed, by its number from 1.")
    endpoint("undo", Visitor.undo, [], "Back to the picture before the last edit.")
    endpoint("redo", Visitor.redo, [], "Take back the last undo.")
    what = "Go to a state by its number."
    endpoint("go", lambda visitor, state: visitor.branch(as_int(state, "state")), [number], what)
