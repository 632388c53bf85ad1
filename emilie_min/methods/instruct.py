"""The methods that follow instructions: EMILIE, and the two ways to chain InstructPix2Pix that it is compared with.

All draw the same noise from a chain's seed, so that what differs between their results is the method.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .. import sampling
from ..canvas import images
from ..canvas.canvas import check_can_edit
from ..canvas.canvas import open as open_canvas
from ..canvas.settings import Settings
from ..canvas.state import State
from ..emilie import Editor
from ..errors import SamplingError
from .base import Chain, Method, Request


@dataclass
class Emilie(Method):
    """Algorithm 1 through `Canvas.edit`, whose arguments the settings are. masks=False leaves masks unused."""

    editor: Editor
    gate: str = "anchor"
    rescale: str = "paper"
    iterate: str = "latent"
    masks: bool = True
    keep_background: bool = False
    steps: int | None = None
    text_scale: float | None = None
    image_scale: float | None = None
    sampler: str = "euler_ancestral"
    sigma_low: float = 0.0  # of the guidance interval
    sigma_high: float = math.inf
    reuse: int = 1
    reuse_guidance: float | None = None

    def __post_init__(self):
        settle(self)

    @property
    def guidance_interval(self) -> tuple[float, float]:
        return self.sigma_low, self.sigma_high

    def edit(self, chain: Chain, request: Request) -> Chain:
        canvas = open_canvas(chain.original, self.editor, seed=chain.seed)
        for past in chain.requests:  # how many they were decides the noise; only the last one's result is read
            canvas.states.append(State(past.instruction, chain.latent, chain.image, parent=canvas.at))
            canvas.at = len(canvas.states) - 1
        mask = request.mask if self.masks else None
        special = {
            "keep_background": self.keep_background and mask is not None,
            "allow_empty": not request.instruction,  # a benchmark's items that ask for nothing
        }
        image = canvas.edit(request.instruction, mask, **changes(self) | special)
        state = canvas.state
        return replace(
            chain,
            image=image,
            latent=state.latent,
            requests=(*chain.requests, request),
            notes={"f": state.f},
            mask=None if mask is None else canvas.read_mask(mask)[0],
        )


@dataclass
class IterativeInstructPix2Pix(Method):
    """Each edit starts from the decoded picture of the one before, encoded again. It knows no masks.

    pixels: what happens to the picture in between. "truncate": 8 bits, rounded down, as the original's `edit_cli`
    writes them; "round": 8 bits, rounded; "float": neither rounded nor clamped, so that only the autoencoder is left.
    """

    editor: Editor
    pixels: str = "truncate"
    steps: int | None = None
    text_scale: float | None = None
    image_scale: float | None = None

    def __post_init__(self):
        settle(self)

    def edit(self, chain: Chain, request: Request) -> Chain:
        if self.pixels == "float" and chain.latent is not None:
            z_img = self.editor.encode(self.editor.decode(chain.latent))
        else:
            z_img = images.to_latent(self.editor, chain.image)
        return follow(self, chain, request, z_img, request.instruction)


@dataclass
class Concatenated(Method):
    """All instructions so far in one text, on the opened picture (Sec. 5.2). It knows no masks.

    The paper does not say what stands between them: here `separator`. Beyond 77 tokens the text is cut, as the
    original does, and the notes say so.
    """

    editor: Editor
    separator: str = ", "
    pixels: str = "truncate"
    steps: int | None = None
    text_scale: float | None = None
    image_scale: float | None = None

    def __post_init__(self):
        settle(self)

    def edit(self, chain: Chain, request: Request) -> Chain:
        text = self.separator.join(past.instruction for past in (*chain.requests, request))
        return follow(
            self, chain, request, images.to_latent(self.editor, self.open(chain.original, chain.seed).image), text
        )


def settle(method: Method) -> Settings:
    """A method's settings with the config's in the place of None, checked before the first edit of a long run.

    Raises SamplingError for what no edit can use, CheckpointError for weights that cannot edit.
    """
    check_can_edit(method.editor)
    if getattr(method, "pixels", "round") not in ("truncate", "round", "float"):
        raise SamplingError(f"pixels must be truncate, round or float, not {method.pixels!r}")
    return Settings(**changes(method)).resolve(method.editor.config.sampling, 0)


def changes(method: Method) -> dict[str, object]:
    """What a method sets of an edit's `Settings`: the fields that it has too."""
    return {field.name: getattr(method, field.name) for field in fields(Settings) if hasattr(method, field.name)}


@torch.no_grad()
def follow(
    method: IterativeInstructPix2Pix | Concatenated, chain: Chain, request: Request, z_img: Tensor, text: str
) -> Chain:
    """One unmasked InstructPix2Pix edit from an image latent (1, 4, h, w), unscaled."""
    editor = method.editor
    settings = settle(method)
    tokens = editor.text.tokenize([text, ""], truncate=True)
    end = editor.text.config.eos_token_id
    cond, uncond = editor.text(tokens.to(editor.device)).split(1)
    shape = tuple(z_img.shape)
    latent = editor.sample(
        z_img,
        cond,
        uncond,
        sampling.get_sigmas(settings.steps, editor.alphas_cumprod),
        sampling.noise_stream(shape, chain.seed, "init")(),
        sampling.noise_stream(shape, chain.seed, "edit", len(chain.requests)),
        text_scale=settings.text_scale,
        image_scale=settings.image_scale,
    ).cpu()
    image = images.from_latent(editor, latent, truncate=method.pixels == "truncate")
    notes = {"tokens": int((tokens[0] != end).sum()) + 1}
    return replace(chain, image=image, latent=latent, requests=(*chain.requests, request), notes=notes, mask=None)
