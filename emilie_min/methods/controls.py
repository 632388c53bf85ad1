"""Ways to change nothing: what any method has to beat, and what coding alone costs."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..canvas import images
from ..emilie import Editor
from .base import Chain, Method, Request


@dataclass
class Untouched(Method):
    """The picture as it was: right wherever nothing had to change."""

    seeded: ClassVar[bool] = False
    editor: Editor

    def edit(self, chain: Chain, request: Request) -> Chain:
        return replace(chain, latent=None, requests=(*chain.requests, request), notes={}, mask=None)


@dataclass
class Autoencoder(Method):
    """The current 8-bit picture encoded and decoded, once a turn: no edit by image iteration loses less."""

    seeded: ClassVar[bool] = False
    editor: Editor

    @torch.no_grad()
    def edit(self, chain: Chain, request: Request) -> Chain:
        latent = self.editor.scale_factor * images.to_latent(self.editor, chain.image)
        image = images.from_latent(self.editor, latent)
        return replace(chain, image=image, latent=None, requests=(*chain.requests, request), notes={}, mask=None)
