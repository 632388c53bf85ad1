"""On CUDA `load(compile=True)`: the readable network by torch.compile, and what that makes recorded as CUDA graphs.

It is compiled by kind of block, so that blocks of the same sizes are compiled once, in torch.compile's default mode:
`max-autotune` spent 12 to 14 s on each matrix product where it was tried (notebooks/speed/GPU.md). The first size is
compiled as it is; of a second one PyTorch makes code for any. What was compiled is kept on disk.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EmilieError, printable
from ..sampling import Scale
from ..unet import Downsample, ResBlock, SpatialTransformer, Upsample
from .graph import GraphEditor
from .tries import inductor_options, tried

CACHE = Path.home() / ".cache" / "emilie_min" / "compiled"
BLOCKS = (ResBlock, SpatialTransformer, Downsample, Upsample)
LIMIT = 1024  # recompilations of one function: PyTorch counts those of all blocks together, and stops at 8


class CompiledEditor(GraphEditor):
    """A `GraphEditor` whose UNet is compiled at the first step of each shape, before that is recorded."""

    compiled = True

    def __post_init__(self) -> None:
        super().__post_init__()
        where = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
        warnings.warn(
            "the first edit compiles first, for about a minute (the whole network at once took 55 s, on 16 cores); "
            f"later ones find what was compiled in {where}",
            stacklevel=2,
        )
        whole, dynamic = "whole" in tried(), False if "static" in tried() else None
        compile_blocks(self.unet, whole=whole, dynamic=dynamic, options=inductor_options() or None)

    def branches(
        self, x: Sequence[Tensor], sigma: Scale, seen: Sequence[Tensor], told: Sequence[Tensor]
    ) -> list[Tensor]:
        """As `GraphEditor.branches`. Raises EmilieError where the network cannot be compiled."""
        raise_limits()  # each thread has PyTorch's settings to itself
        try:
            return super().branches(x, sigma, seen, told)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = printable((str(error).strip() or type(error).__name__).partition("\n")[0])
            raise EmilieError(f"the network cannot be compiled here: {reason}. Load it without compile") from error


def compile_blocks(unet: nn.Module, whole: bool = False, **options: Any) -> None:
    """Compile every block where it stands, or the whole as one, at its first call; options: of `torch.compile`."""
    raise_limits()
    for module in [unet] if whole else unet.modules():
        if whole or isinstance(module, BLOCKS):
            module.compile(fullgraph=True, **options)


def raise_limits() -> None:
    """Let this thread compile a block for as many sizes as there are."""
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(torch._dynamo.config, name) < LIMIT:
            setattr(torch._dynamo.config, name, LIMIT)
