"""A node in the tree of edits."""

import uuid
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor


@dataclass
class State:
    """What an instruction led to, and how. State 0 is the picture as it was opened."""

    instruction: str  # of several: "make it red + make it blue"
    latent: Tensor  # scaled, (1, 4, h, w) float32 on the CPU
    image: Image.Image
    parent: int | None = None
    mask: Image.Image | None = None  # at working size; of several, their union
    settings: dict = field(default_factory=dict)
    f: float | None = None  # the factor with which the parent's latent became z_img; None: z_img was encoded
    regions: list[tuple[str, Image.Image | None]] = field(default_factory=list)  # several instructions and their masks
    depth: int | None = None  # that its noise is drawn for, an edit's own for good; None: its place in the history
    shown: bool | None = True  # False: hidden, so the latent is the parent's; None: no edit, the opened picture again
    strength: float = 1.0  # how far from the parent's latent to the edit's own
    made: dict | None = None  # by a change of the stack: which, from the state of which id, in how many network calls
    inserted: dict | None = None  # by `insert.insertion`: the caption, the proposals' boxes, which was taken
    given: Image.Image | None = None  # where the edit may act at the photo's size, PIL "1"; None: it is not known
    kept: dict[int, Tensor] = field(default_factory=dict)  # the sampler's x before some steps; in no file: see `scrub`
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # by which files tell it from every other
