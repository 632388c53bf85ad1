"""The three networks of a config, built without weights."""

from pathlib import Path

import torch
from torch import nn

from ..config import Config
from ..errors import ConfigError, first_line, printable
from ..text import TextEncoder
from ..unet import UNetModel
from ..vae import AutoencoderKL
from .tokenizer import Tokenizer


def build(config: Config, tokenizer_folders: tuple[str | Path, ...] = ()) -> dict[str, nn.Module]:
    """The three networks of a config: "unet", "vae", "text". Under `torch.device("meta")` they take no memory.

    Raises ConfigError, with PyTorch's reason, for sizes of which no network can be built.
    """
    networks = {}
    makers = {
        "unet": lambda: UNetModel(config.unet),
        "vae": lambda: AutoencoderKL(config.vae),
        "text": lambda: TextEncoder(config.text, Tokenizer(config.text, tokenizer_folders)),
    }
    for part, make in makers.items():
        try:
            networks[part] = make()
        except Exception as error:  # of whatever layer it is
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise
            wrong = f"config {config.name}: {part}: no network has these sizes: {first_line(error, last=True)}"
            raise ConfigError(printable(wrong)) from error
    return networks


def meta_networks(config: Config) -> dict[str, nn.Module]:
    """`build` on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return build(config)


def not_finite(network: nn.Module) -> str | None:
    """The name of a network's first tensor with NaN or infinite numbers, or None."""
    for name, tensor in network.state_dict().items():
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():  # the sum alone may overflow
            return name
    return None
