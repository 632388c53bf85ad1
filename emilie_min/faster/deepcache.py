"""Deep features reused from step to step: faster by doing less, off by default."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..emilie import Editor
from ..unet import UNetModel, timestep_embedding

SHALLOW = 2  # blocks on the way down, and on the way up, that always run


class DeepCache:
    """A UNet whose deep layers run at every n-th call and are reused in between (DeepCache, Ma et al. 2024).

    From step to step the deep features change little. The first `SHALLOW` blocks on the way down and the last on the
    way up always run; of the blocks between them what came out last is kept. One object serves one edit. Where the
    branches run in turn, `branch` says which one is next: each has features of its own.
    """

    def __init__(self, unet: UNetModel, every: int):
        self.unet, self.every, self.branch = unet, every, 0
        self.call: Callable = lambda run, *inputs: run(*inputs)  # how `forward` is: on CUDA from a graph
        self.calls: dict[int, int] = {}
        self.deep: dict[int, Tensor] = {}

    def is_full_step(self, rows: int) -> bool:
        """Whether this call has to run the deep layers: also when the number of rows has changed."""
        calls = self.calls[self.branch] = self.calls.get(self.branch, 0) + 1
        kept = self.deep.get(self.branch)
        return (calls - 1) % self.every == 0 or kept is None or kept.shape[0] != rows

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        deep = () if self.is_full_step(x.shape[0]) else (self.deep[self.branch],)
        eps, self.deep[self.branch] = self.call(forward, self.unet, x, t, context, *deep)
        return eps


def forward(
    unet: UNetModel, x: Tensor, t: Tensor, context: Tensor, deep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The network around what its deep layers gave, or all of it -> eps, and what its deep layers give."""
    emb, skips, k = unet.time_embed(timestep_embedding(t, unet.model_channels).to(x.dtype)), [], SHALLOW
    for block in unet.input_blocks if deep is None else unet.input_blocks[:k]:
        x = block(x, emb, context)
        skips.append(x)
    if deep is None:
        deep = unet.middle_block(x, emb, context)
        for block in unet.output_blocks[:-k]:
            deep = block(torch.cat([deep, skips.pop()], dim=1), emb, context)
    x = deep
    for block in unet.output_blocks[-k:]:
        x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
    return unet.out(x), deep


def reuse_deep_features(editor: Editor, every: int) -> Editor:
    """The editor for one edit whose deep layers run at every n-th step."""
    editor = copy.copy(editor)
    editor.unet = DeepCache(editor.unet, every)  # type: ignore[assignment]  # called like a UNet
    return editor
