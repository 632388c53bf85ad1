"""Plug-and-Play (Tumanyan et al. 2023): the new picture is drawn with the features and self-attention of the old."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..canvas.settings import as_int
from ..errors import SamplingError
from ..unet import SpatialTransformer, UNetModel
from . import ddim, hooks
from .text_to_image import TextToImage, Work


def modules(unet: UNetModel, feature_block: int | None = None, attention_block: int | None = None) -> tuple[list, list]:
    """Names of the modules whose outputs are injected: of a residual branch, and of self-attention's q and k.

    Attention: every output block that attends, from `attention_block` on; None = from the second that attends on.
    Features: output block `feature_block`; None = where the attention begins. On Stable Diffusion's UNet that is the
    original's choice, blocks 4 to 11 and block 4. Raises SamplingError for a block that is not there.
    """
    attending = {  # output block -> the place of its transformer
        i: j
        for i, block in enumerate(unet.output_blocks)
        for j, layer in enumerate(block)
        if isinstance(layer, SpatialTransformer)
    }
    if not attending:
        raise SamplingError("this UNet attends in none of its output blocks: there is no attention to inject")
    if attention_block is None:
        attention_block = [*attending, *attending][1]  # the only one where there is no second
    if feature_block is None:
        feature_block = attention_block
    for name, block in (("feature_block", feature_block), ("attention_block", attention_block)):
        if block not in range(len(unet.output_blocks)):
            raise SamplingError(f"{name} must be a whole number from 0 to {len(unet.output_blocks) - 1}, not {block!r}")
    return [f"output_blocks.{feature_block}.0.out_layers"], [
        f"output_blocks.{i}.{j}.transformer_blocks.0.attn1.{projection}"
        for i, j in attending.items()
        if i >= attention_block
        for projection in ("to_q", "to_k")
    ]


@dataclass
class PlugAndPlay(TextToImage):
    """The picture inverted, then reconstructed beside the edit, which takes over what the reconstruction computes.

    Inversion and reconstruction are told "". feature_steps, attention_steps: the share of the steps up to and with
    which residual features, and q and k, are injected, into both halves of guidance: of 50 the first 41 and 26, as in
    the original, whose comparisons are inclusive; 0: none. feature_block, attention_block: see `modules`.
    inversion_steps: of inversion and reconstruction; None = all timesteps, 999, as in the original, at 1851
    passes of the UNet for an edit of 50. Fewer reconstruct worse, and from some pictures a thing is lost; the levels
    of the edit are always among those of the inversion.

    What differs from the original: the latent is the posterior's mode, not a sample; inversion ends at the level where
    the edit begins (t = 981) and not at 999, whose latent is a little noisier than the edit takes it for; features are
    captured step by step as they are needed, to the same numbers, without storing them. Negative prompts are left out:
    with the source's prompt "", which is theirs by default, they have no effect. Masks play no part, and nothing is
    drawn, so the seed does not matter.
    """

    seeded: ClassVar[bool] = False
    guidance: float | None = 10.0
    inversion_steps: int | None = None
    feature_steps: float = 0.8
    attention_steps: float = 0.5
    feature_block: int | None = None
    attention_block: int | None = None

    def __post_init__(self):
        super().__post_init__()
        total = self.editor.config.diffusion.timesteps
        self.inversion_steps = total - 1 if self.inversion_steps is None else self.inversion_steps
        ddim.timesteps(as_int(self.inversion_steps, "inversion_steps"), total)  # raises where there are none
        self.check_fraction("feature_steps")
        self.check_fraction("attention_steps")
        modules(self.editor.unet, self.feature_block, self.attention_block)

    def injected(self) -> list[list[str]]:
        """The names of the modules that are injected at each step, first to last."""
        features, attention = modules(self.editor.unet, self.feature_block, self.attention_block)
        names = [[] for _ in range(self.steps)]
        for fraction, group in ((self.feature_steps, features), (self.attention_steps, attention)):
            for i in range(ddim.share(fraction, self.steps) + 1 if fraction else 0):
                if i < self.steps:
                    names[i] += group
        return names

    def run(self, work: Work) -> Tensor:
        unet, alphas, names = self.editor.unet, work.alphas, self.injected()
        levels = ddim.levels(self.steps, len(alphas))
        fine = sorted({*levels, *ddim.timesteps(self.inversion_steps, len(alphas))})
        fine = fine[: fine.index(levels[-1]) + 1]
        source, target = work.eps(""), work.eps(work.text, self.guidance)

        z = old = ddim.invert(source, work.source, fine, alphas)[-1]
        for i, (t, t_to) in enumerate(zip(levels[:0:-1], levels[-2::-1])):
            saved = {}
            if names[i]:
                with hooks.capture(unet, names[i]) as saved:
                    eps = source(old, t)
                below = fine[fine.index(t_to) : fine.index(t)]  # what the reconstruction passes on its way to t_to
                old = ddim.step(old, eps, alphas[t], alphas[below[-1]])
                old = ddim.sample(source, old, below, alphas)
            with hooks.override(unet, saved):
                z = ddim.step(z, target(z, t), alphas[t], alphas[t_to])
        work.notes = {"injected": {name: sum(name in step for step in names) for name in names[0]}}  # steps, by module
        return z
