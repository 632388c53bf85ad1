"""Deep features reused from step to step: faster by doing less, off by default."""

import copy

import torch
from torch import Tensor

from ..emilie import Editor
from ..unet import UNetModel, timestep_embedding


class DeepCache:
    """A UNet whose deep layers run at every n-th call and are reused in between (DeepCache, Ma et al. 2024).

    From step to step the deep features change little. The first `SHALLOW` blocks on the way down and the last on the
    way up always run; of the blocks between them what came out last is kept. One object serves one edit. Where the
    branches run in turn, `branch` says which one is next: each has features of its own.
    """

    SHALLOW = 2

    def __init__(self, unet: UNetModel, every: int):
        self.unet, self.every, self.branch = unet, every, 0
        self.calls: dict[int, int] = {}
        self.deep: dict[int, Tensor] = {}

    def is_full_step(self, rows: int) -> bool:
        """Whether this call has to run the deep layers: also when the number of rows has changed."""
        calls = self.calls[self.branch] = self.calls.get(self.branch, 0) + 1
        kept = self.deep.get(self.branch)
        return (calls - 1) % self.every == 0 or kept is None or kept.shape[0] != rows

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        unet, k, full = self.unet, self.SHALLOW, self.is_full_step(x.shape[0])
        emb, skips = unet.time_embed(timestep_embedding(t, unet.model_channels).to(x.dtype)), []
        for block in unet.input_blocks if full else unet.input_blocks[:k]:
            x = block(x, emb, context)
            skips.append(x)
        if full:
            x = unet.middle_block(x, emb, context)
            for block in unet.output_blocks[:-k]:
                x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
            self.deep[self.branch] = x
        x = self.deep[self.branch]
        for block in unet.output_blocks[-k:]:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return unet.out(x)


def reuse_deep_features(editor: Editor, every: int) -> Editor:
    """The editor for one edit whose deep layers run at every n-th step."""
    editor = copy.copy(editor)
    editor.unet = DeepCache(editor.unet, every)  # type: ignore[assignment]  # called like a UNet
    return editor
