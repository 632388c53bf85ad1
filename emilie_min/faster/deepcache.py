"""Deep features reused from step to step: faster by doing less, off by default."""

import torch
from torch import Tensor, nn

from ..unet import timestep_embedding


class DeepCache:
    """A UNet whose deep layers run at every n-th call and are reused in between (DeepCache, Ma et al. 2024).

    From step to step the deep features change little. The first `SHALLOW` blocks on the way down and the last on the
    way up always run; of the blocks between them what came out last is kept. One object serves one edit.
    """

    SHALLOW = 2

    def __init__(self, unet: nn.Module, every: int):
        self.unet, self.every, self.calls, self.deep = unet, every, 0, None

    def fresh(self, rows: int) -> bool:
        """Whether this call has to run the deep layers: also when the number of branches has changed."""
        self.calls += 1
        return (self.calls - 1) % self.every == 0 or self.deep is None or self.deep.shape[0] != rows

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        unet, k, fresh = self.unet, self.SHALLOW, self.fresh(x.shape[0])
        emb, skips = unet.time_embed(timestep_embedding(t, unet.model_channels).to(x.dtype)), []
        for block in unet.input_blocks if fresh else unet.input_blocks[:k]:
            x = block(x, emb, context)
            skips.append(x)
        if fresh:
            x = unet.middle_block(x, emb, context)
            for block in unet.output_blocks[:-k]:
                x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
            self.deep = x
        x = self.deep
        for block in unet.output_blocks[-k:]:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return unet.out(x)
