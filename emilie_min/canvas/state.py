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
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # by which files tell it from every other
