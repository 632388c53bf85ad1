"""What every compared method looks like from outside: one picture, request after request.

A method keeps nothing between edits. All that one edit hands to the next is a `Chain`, which can be written to disk
and read back, so that a run that was killed goes on where it stopped with the same result.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image
from torch import Tensor

from ..canvas import images
from ..emilie import Editor


@dataclass(frozen=True)
class Request:
    """One thing asked of a picture."""

    instruction: str
    mask: Image.Image | None = None  # "L", of the opened picture's size, white = edit
    caption: str | None = None  # what the result shall show: what a text-to-image model can be told
    before: str | None = None  # what the picture shows before


@dataclass(frozen=True)
class Chain:
    """Where a chain of edits stands."""

    original: Image.Image  # as it was opened, of any size
    seed: int
    image: Image.Image  # the current picture, at working size
    latent: Tensor | None = None  # of the last edit, diffusion scale, (1, 4, h, w) float32 on the CPU
    requests: tuple[Request, ...] = ()  # those answered so far
    notes: dict = field(default_factory=dict)  # of the last edit: what is worth recording, as plain JSON values
    mask: Image.Image | None = None  # that the last edit used, given or found, at working size


class Method(ABC):
    """A way to edit. Subclasses are dataclasses whose fields after `editor` are the settings a user can change."""

    needs: ClassVar[str] = "instructions"  # "instructions": InstructPix2Pix's model; "captions": a text-to-image model
    seeded: ClassVar[bool] = True  # False: nothing is drawn, so every seed gives the same pictures
    editor: Editor

    def open(self, image: Image.Image, seed: int) -> Chain:
        """A chain without edits: the picture scaled as `canvas.open` does it."""
        defaults = self.editor.config.sampling
        original = images.read_image(image)
        size = images.fit_size(original.size, defaults.resolution, defaults.multiple)
        return Chain(original, seed, images.fit(original, size))

    @abstractmethod
    def edit(self, chain: Chain, request: Request) -> Chain:
        """Answer a request; `chain` is left as it was. Raises EmilieError."""
