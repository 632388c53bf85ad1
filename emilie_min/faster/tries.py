"""What may be faster on a card and nobody has measured yet, to be tried by name:

    EMILIE_TRY=pad_heads,conv_1x1_as_mm=1 emilie speed --compile ...

pad_heads: attention heads narrower than 64 padded to it, in the weights; vae: the autoencoder recorded as graphs too;
cudnn_benchmark: cuDNN chooses its algorithms by timing them. Where the network is compiled: whole: as one, not by
block; static: each size for itself; any NAME=VALUE of torch._inductor.config. `notebooks/speed/GPU.md` keeps the log.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import EmilieError
from ..unet import CrossAttention

NAMES = ("pad_heads", "vae", "cudnn_benchmark", "whole", "static")
HEAD = 64


def tried() -> set[str]:
    """The names in EMILIE_TRY that are ours. Raises EmilieError for an unknown one."""
    names = {name for name in _given() if "=" not in name}
    if unknown := ", ".join(sorted(names - set(NAMES))):
        raise EmilieError(
            f"EMILIE_TRY: unknown {unknown}: choose from {', '.join(NAMES)}, or NAME=VALUE of torch._inductor.config"
        )
    return names


def inductor_options() -> dict[str, bool | int | str]:
    """The NAME=VALUE in EMILIE_TRY, for `torch.compile`. Raises EmilieError for what is no option."""
    from torch._inductor import config

    options: dict[str, bool | int | str] = {}
    for name, _, text in (word.partition("=") for word in _given() if "=" in word):
        now = getattr(config, name, None)
        if isinstance(now, (bool, int)) and text.isdecimal():
            options[name] = type(now)(int(text))
        elif isinstance(now, str):
            options[name] = text
        else:
            raise EmilieError(f"EMILIE_TRY: {name}={text} is no setting of torch._inductor.config")
    return options


def _given() -> list[str]:
    return [word.strip() for word in os.environ.get("EMILIE_TRY", "").split(",") if word.strip()]


@torch.no_grad()
def pad_heads(network: nn.Module, dim: int = HEAD) -> None:
    """Give attention heads narrower than `dim` that many features, the further ones zero: the same result."""
    for attn in network.modules():
        if isinstance(attn, CrossAttention) and (old := attn.to_q.out_features // attn.heads) < dim:
            for linear in (attn.to_q, attn.to_k, attn.to_v):
                rows = F.pad(linear.weight.unflatten(0, (attn.heads, old)), (0, 0, 0, dim - old))
                linear.weight = nn.Parameter(rows.flatten(0, 1), requires_grad=False)
                linear.out_features = attn.heads * dim
            attn.to_q.weight *= (dim / old) ** 0.5  # attention divides by the root of the width
            out = attn.to_out[0]
            assert isinstance(out, nn.Linear)
            columns = F.pad(out.weight.unflatten(1, (attn.heads, old)), (0, dim - old))
            out.weight, out.in_features = nn.Parameter(columns.flatten(1), requires_grad=False), attn.heads * dim
