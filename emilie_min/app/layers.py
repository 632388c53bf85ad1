"""The studio's stack: the current picture's edits as a strip, each with an eye, a cross and a slider, to be dragged."""

from collections.abc import Iterator
from html import escape

from ..canvas import stack
from ..errors import CanvasError
from .visitor import THUMB, Told, Visitor, calls, data_url, enlarge

CHANGES = ("retract", "hide", "show", "move", "strength", "revise")  # that a click or a drag can ask for


def stack_html(visitor: Visitor) -> str:
    """A card an edit, first to last; "" where there is none."""
    canvas = visitor.canvas
    if canvas is None or not canvas.stack:
        return ""
    cards = []
    for k, state in enumerate(canvas.stack, 1):
        name, eye = ("hide", "&#9673;") if state.shown else ("show", "&#8856;")
        kind = " hidden" * (not state.shown) + " revised" * (k == visitor.revised)

        def button(change: str, sign: str, told: str, value: int = 0, k: int = k) -> str:
            return (
                f'<button data-change="{change}" data-value="{value}" title="{told}" aria-label="{told}: edit {k}"'
                f"{' disabled' * (change == 'move' and not 1 <= value <= len(canvas.stack))}>{sign}</button>"
            )

        cards.append(
            f'<div class="layer{kind}" draggable="true" data-edit="{k}">'
            f'<img src="{data_url(enlarge(state.image, THUMB))}" alt="" draggable="false">'
            f'<span title="{escape(state.instruction)}"><b>{k}</b> {escape(state.instruction)}</span>'
            f'<input type="range" min="0" max="1" step="0.05" value="{state.strength:g}" title="how much of it" '
            f'aria-label="strength of edit {k}"><p>'
            + button("move", "&lsaquo;", "earlier", k - 1)
            + button(name, eye, name)
            + button("revise", "&#9998;", "say it anew")
            + button("retract", "&times;", "take it out")
            + button("move", "&rsaquo;", "later", k + 1)
            + "</p></div>"
        )
    told = "The edits of this picture. Hide one, take one out, weaken it, say it anew, or drag it: the others stay."
    if visitor.photo is not None and visitor.photo.earlier:
        told += " Those before this crop are part of its picture: Undo leads back to them."
    return f'<p class="told">{told}</p><div class="layers">{"".join(cards)}</div>'


def change(visitor: Visitor, asked: dict | None) -> Iterator[Told]:
    """What a card asks for: {"change": one of `CHANGES`, "state": the edit's number, "value": where to or how much}.

    "revise" puts the edit on the page, and the next press of Edit makes it anew.
    """
    visitor.stopped, canvas = False, visitor.opened()
    if not asked or "change" not in asked:
        raise CanvasError("a click on the stack says which edit and what")
    name, k, value = asked["change"], int(asked["state"]), float(asked.get("value") or 0)
    if name == "revise":
        yield visitor.take_up(k), 1, None
        return
    more = {"move": [int(value)], "strength": [value]}.get(name, [])
    steps = visitor.editor.config.sampling.steps * (1 + len(canvas.stack) - k)
    for done, _ in enumerate(stack.change(canvas, name, k, *more)):
        visitor.go_on()
        yield f"{name} edit {k}: the later ones are made anew where it mattered", min(0.99, done / steps), None
    visitor.put_down()
    yield f"{name} edit {k}: {calls(canvas)}", 1, None
