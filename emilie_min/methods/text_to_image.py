"""What the methods on a text-to-image model share: what the model is told, eps with guidance, how an edit ends."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..canvas import images
from ..canvas.settings import as_int
from ..emilie import Editor
from ..errors import CheckpointError, InstructionError, SamplingError, explain_oom
from ..sampling import noise_stream
from . import ddim
from .base import Chain, Method, Request

PROMPTS = ("caption", "instruction")


def predict(editor: Editor, context: Tensor, guidance: float, z: Tensor, t: int) -> Tensor:
    """eps of latents (B, 4, h, w) at level t, as `Work.eps` says; context: (B, 77, D), or that of "" and then it."""
    branches = len(context) // len(z)
    t = torch.full((len(context),), t, device=z.device)
    eps = editor.unet(z.to(editor.dtype).repeat(branches, 1, 1, 1), t, context).float().chunk(branches)
    return eps[0] + guidance * (eps[1] - eps[0]) if branches == 2 else eps[0]


@dataclass
class Work:
    """One edit while it is made. Latents are in diffusion scale, float32, on the editor's device."""

    editor: Editor
    chain: Chain
    request: Request
    text: str  # what the model is told
    before: str  # the same of the picture as it is; "": not known
    source: Tensor  # of the current picture, (1, 4, h, w)
    noise: Callable[[], Tensor]  # unit noise of that shape, new with every call
    alphas: list[float]  # alphas_cumprod, float64
    mask: Image.Image | None = None  # what `Chain.mask` will be
    notes: dict = field(default_factory=dict)
    passes: int = 0  # calls of the UNet, one after another; the two halves of guidance are one

    def eps(self, text: str, guidance: float = 1.0) -> ddim.Eps:
        """eps of the model that is told `text`, with classifier-free guidance (Ho & Salimans 2022) unless it is 1.

        e("") + guidance (e(text) - e("")); for the text "" that is e("") at any guidance, in one pass as well.
        """
        editor, guided = self.editor, guidance != 1 and text
        context = editor.context(["", text] if guided else [text]).to(editor.dtype)

        def eps(z: Tensor, t: int) -> Tensor:
            self.passes += 1
            return predict(editor, context, guidance, z, t)

        return eps

    def given_mask(self) -> Tensor | None:
        """The request's mask as cells of the latent, (1, 1, h, w) in {0, 1}; `mask` becomes the one used."""
        if self.request.mask is None:
            return None
        self.mask = images.read_mask(self.request.mask, self.chain.original.size, self.chain.image.size)
        return images.latent_mask(self.mask, self.editor.vae.factor).to(self.source.device)


@dataclass
class TextToImage(Method):
    """A method on a 4-channel Stable Diffusion, whose every edit starts from the current picture, encoded again.

    The picture is the 8-bit one that the edit before left: iteration by image. Sampling is DDIM's, one picture at a
    time; noise follows from the chain's seed and how many edits there were.

    prompt: "caption" tells the model the request's caption, which is what these methods are made for; "instruction"
    tells it the instruction instead, as EMILIE's comparison seems to do. steps: None = the config's. guidance: None =
    the config's text_scale, 7.5 for Stable Diffusion. A chain's notes hold these settings, the text, and
    `unet_passes`: calls one after another, of which those with guidance have a batch of two.
    Raises CheckpointError for an editor that is no text-to-image model, SamplingError for settings out of range.
    """

    needs: ClassVar[str] = "captions"
    editor: Editor
    prompt: str = "caption"
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self):
        unet, params, defaults = self.editor.unet, self.editor.config.diffusion, self.editor.config.sampling
        if unet.in_channels != params.channels:
            raise CheckpointError(
                f"{self.editor.model} takes {unet.in_channels} channels and {type(self).__name__} needs "
                f"{params.channels}, a noisy latent alone: load a text-to-image model, with the config toy-t2i or sd15"
            )
        if self.prompt not in PROMPTS:
            raise SamplingError(f"unknown prompt {self.prompt!r}: choose from {', '.join(PROMPTS)}")
        self.steps = as_int(defaults.steps if self.steps is None else self.steps, "steps")
        ddim.timesteps(self.steps, params.timesteps)  # raises where there are none
        self.guidance = defaults.text_scale if self.guidance is None else self.guidance
        if not isinstance(self.guidance, (int, float)) or not math.isfinite(self.guidance):
            raise SamplingError(f"guidance must be a finite number, not {self.guidance!r}")

    @abstractmethod
    def run(self, work: Work) -> Tensor:
        """The edited latent, diffusion scale, (1, 4, h, w). May set `work.mask` and `work.notes`."""

    @torch.no_grad()
    def edit(self, chain: Chain, request: Request) -> Chain:
        editor, text = self.editor, getattr(request, self.prompt)
        if text is None:
            raise InstructionError(
                f"{request.instruction!r} has no caption, and {type(self).__name__} is told what the picture shall "
                'show: give the request a caption, or set prompt to "instruction"'
            )
        before = (request.before or "") if self.prompt == "caption" else ""
        with explain_oom(f"at {chain.image.width}x{chain.image.height} px: lower --resolution"):
            source = editor.scale_factor * images.to_latent(editor, chain.image)
            draw = noise_stream(tuple(source.shape), chain.seed, "edit", len(chain.requests))
            alphas = editor.alphas_cumprod.double().tolist()
            work = Work(editor, chain, request, text, before, source, lambda: draw().to(source.device), alphas)
            latent = self.run(work).cpu()
            image = images.from_latent(editor, latent)
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "editor"}
        notes = {**settings, "text": text, "unet_passes": work.passes, **work.notes}
        requests = (*chain.requests, request)
        return replace(chain, image=image, latent=latent, requests=requests, notes=notes, mask=work.mask)

    def check_fraction(self, name: str, top: float = 1.0) -> None:
        """Raises SamplingError where a setting is not from 0 to `top`."""
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or not 0 <= value <= top:
            raise SamplingError(f"{name} must be a number from 0 to {top:g}, not {value!r}")
