"""The studio's stack: the current picture's edits as a strip, each with an eye, a cross and a slider, to be dragged."""

from collections.abc import Iterator
from html import escape

from ..canvas import stack
from ..canvas.canvas import Canvas
from ..errors import CanvasError
from .visitor import THUMB, Told, Visitor, data_url, enlarge

CHANGES = ("retract", "hide", "show", "move", "strength")  # that a click or a drag can ask for


def stack_html(canvas: Canvas | None) -> str:
    """A card an edit, first to last; "" where there is none."""
    if canvas is None or not canvas.stack:
        return ""
    cards = []
    for k, state in enumerate(canvas.stack, 1):
        name, eye = ("hide", "&#9673;") if state.shown else ("show", "&#8856;")
        cards.append(
            f'<div class="layer{"" if state.shown else " hidden"}" draggable="true" data-edit="{k}">'
            f'<img src="{data_url(enlarge(state.image, THUMB))}" alt="" draggable="false">'
            f'<span title="{escape(state.instruction)}"><b>{k}</b> {escape(state.instruction)}</span>'
            f'<p><button data-change="{name}" title="{name} this edit" aria-label="{name} edit {k}">{eye}</button>'
            f'<input type="range" min="0" max="1" step="0.05" value="{state.strength:g}" title="how much of it" '
            f'aria-label="strength of edit {k}">'
            f'<button data-change="retract" title="take it out" aria-label="take out edit {k}">&times;</button></p>'
            "</div>"
        )
    told = "The edits of this picture. Hide one, take one out, weaken it, or drag it: the others stay."
    return f'<p class="told">{told}</p><div class="layers">{"".join(cards)}</div>'


def change(visitor: Visitor, asked: dict | None) -> Iterator[Told]:
    """What a card asks for: {"change": one of `CHANGES`, "state": the edit's number, "value": where to or how much}."""
    visitor.stopped, canvas = False, visitor.opened()
    if not asked or "change" not in asked:
        raise CanvasError("a click on the stack says which edit and what")
    name, k, value = asked["change"], int(asked["state"]), float(asked.get("value") or 0)
    more = {"move": [int(value)], "strength": [value]}.get(name, [])
    steps = visitor.editor.config.sampling.steps * (1 + len(canvas.stack) - k)
    for done, _ in enumerate(stack.change(canvas, name, k, *more)):
        visitor.go_on()
        yield f"{name} edit {k}: the later ones are made anew where it mattered", min(0.99, done / steps), None
    calls = canvas.state.made["calls"]
    yield f"{name} edit {k}: {f'{calls} network calls' if calls else 'no network call was needed'}", 1, None
