"""What a visitor of the studio inserts: an inset, what it shows, and places for it as outlines on the picture."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from ..canvas.canvas import Canvas
from ..canvas.insets import Inset, read_inset
from ..canvas.photo import Photo
from ..canvas.pictures import Picture, open_picture
from ..canvas.state import State
from ..emilie import Editor
from ..errors import CanvasError, InstructionError
from ..insert import insertion
from ..insert.caption import Captioner, find
from ..insert.graconet import GracoNet

PROPOSALS, LARGEST = 4, 256  # places; px of the inset on the page
WHERE = "where to? Paint there, or start the studio with --graconet 11.pth, which proposes places"
WHAT = "what is it? Say so under Caption and press Propose places; or start the studio with --blip2, which says it"


class Networks:
    """GracoNet and BLIP-2, of all visitors, loaded when they are asked for first.

    graconet: a file; blip2: a folder or a name in the hub's cache; None: the small ones, for the small editor only.
    What is named and cannot be used is told at once: raises CheckpointError.
    """

    def __init__(self, editor: Editor, graconet: Path | None = None, blip2: str | None = None):
        self.editor, self.graconet, self.blip2 = editor, graconet, blip2
        if graconet is not None:
            _ = self.proposer
        if blip2 is not None:
            find(blip2)

    @cached_property
    def proposer(self) -> GracoNet:
        if self.graconet is None and not insertion.small_world(self.editor):
            raise CanvasError(WHERE)
        return insertion.load_proposer(self.editor, self.graconet)

    @cached_property
    def captioner(self) -> Captioner:
        if self.blip2 is None and not insertion.small_world(self.editor):
            raise InstructionError(WHAT)
        return insertion.load_captioner(self.editor, self.blip2)


class Inserting:
    """One visitor's inset. The places are for one state of a canvas, and shown where that is the current one."""

    def __init__(self, networks: Networks):
        self.networks = networks
        self.picture: Image.Image | None = None  # as it was given, before a mask
        self.inset: Inset | None = None
        self.plan: insertion.Plan | None = None
        self.state: State | None = None  # that the plan is for
        self.more = 0  # how often other places were asked for
        self.caption = ""  # what the page's field has said or been told last
        self.told: str | None = None  # a caption that the field is to be told

    def take(self, picture: Picture, caption: str = "") -> str:
        """Begin with another inset. -> its caption: the one given or, if that is of the inset before, "".

        Raises ImageError.
        """
        image = open_picture(picture)
        self.inset, self.picture, self.plan = read_inset(image), image, None
        if caption.strip() and caption != self.caption:
            return caption
        self.caption = self.told = ""
        return ""

    def mask(self, mask: Picture | None) -> None:
        """Raises CanvasError, ImageError, MaskError."""
        if self.picture is None:
            raise CanvasError("first the inset's picture, then its mask")
        self.inset, self.plan = read_inset(self.picture, mask), None

    def clear(self) -> None:
        self.picture = self.inset = self.plan = self.state = None
        self.caption, self.told = "", ""

    def propose(
        self, target: Canvas | Photo, caption: str, at: Image.Image | None, n: int = PROPOSALS, seed: int | None = None
    ) -> str:
        """Find places for the inset, or take a mask's; caption: "" = BLIP-2's. -> what is told. Raises EmilieError."""
        canvas = target.canvas if isinstance(target, Photo) else target
        if self.inset is None:
            raise CanvasError("there is no inset yet: drop a picture of an object")
        again = self.plan is not None and self.state is canvas.state and at is None and seed is None
        self.more = self.more + 1 if again else 0
        seed, networks = canvas.seed + self.more if seed is None else seed, self.networks
        proposer = networks.proposer if at is None else None
        captioner = None if caption.strip() else networks.captioner
        self.plan = insertion.plan(
            target, self.inset, None, at, n, caption or None, seed, proposer=proposer, captioner=captioner
        )
        self.state, self.caption, self.told = canvas.state, self.plan.caption, self.plan.caption
        places = f"{len(self.plan.boxes)} places" if len(self.plan.boxes) > 1 else "a place"
        return f'It shows "{self.plan.caption}"; {places} for it: click one on the picture'

    def cut_out(self) -> Image.Image:
        """The inset with its mask as alpha, no larger than the page can use."""
        out = self.inset.pixels.copy()
        out.putalpha(self.inset.mask)
        out.thumbnail((LARGEST, LARGEST))
        return out

    def places(self, state: State | None) -> insertion.Plan | None:
        return self.plan if state is not None and self.state is state else None

    def ready(self, state: State, caption: str) -> insertion.Plan:
        """The plan for a state, with what the inset is called now. Raises CanvasError."""
        plan = self.places(state)
        if plan is None:
            raise CanvasError("no place is proposed for this picture: press Propose places")
        self.caption = " ".join(caption.split()) or plan.caption
        return replace(plan, caption=self.caption)
