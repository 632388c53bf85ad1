"""The lean path, `load(..., low_memory=True)`: a 512 px edit on a card of 4 GB, or in half the memory of a computer.

On a GPU guidance's branches run one after another, and the three networks wait in main memory and take turns on the
card. On a CPU, where weights are what fills the memory, every weight is held in float16 and widened while its layer
runs, so that the arithmetic stays float32: the same numbers as without, where the file is float16, which `emilie
convert` writes. What it costs: `notebooks/speed/README.md`.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..emilie import Editor
from .deepcache import DeepCache

NETWORKS = ("unet", "vae", "text")


class LeanEditor(Editor):
    """An `Editor` of which one network at a time is on the device: the one that was asked for last."""

    def __init__(self, config, unet: nn.Module, vae: nn.Module, text: nn.Module, *args, **kwargs):
        self.networks = {"unet": unet, "vae": vae, "text": text}
        super().__init__(config, unet, vae, text, *args, **kwargs)
        self.one_by_one = self.device.type != "cpu"
        if self.device.type == "cpu" and self.dtype == torch.float32:
            for network in self.networks.values():
                hold_in_half(network)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in NETWORKS:  # those are in `networks`, and found by `__getattr__`
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> nn.Module:
        if name not in NETWORKS:
            raise AttributeError(name)
        if self.device.type != "cpu":
            for other in NETWORKS:
                if other != name:
                    self.networks[other].to("cpu")
            self.networks[name].to(self.device)
        return self.networks[name]

    @torch.no_grad()
    def denoise(self, x, sigma, z_img, cond, uncond, text_scale, image_scale, weights=(1.0,), unet=None) -> Tensor:
        """As `Editor.denoise`, on a GPU one branch after another."""
        unet = unet or (self.in_turn() if self.one_by_one else None)
        return super().denoise(x, sigma, z_img, cond, uncond, text_scale, image_scale, weights, unet)

    def denoiser(self, sigmas, z_img, cond, uncond, weights, reuse=1) -> Callable[..., Tensor]:
        """As `Editor.denoiser`; on a GPU each branch keeps deep features of its own."""
        if not self.one_by_one:
            return super().denoiser(sigmas, z_img, cond, uncond, weights, reuse)
        unet = self.in_turn(reuse)
        return lambda x, sigma, *scales: self.denoise(x, sigma, z_img, cond, uncond, *scales, weights, unet)

    def in_turn(self, reuse: int = 1) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The UNet, row by row."""
        branches = defaultdict(lambda: DeepCache(self.unet, reuse) if reuse > 1 else self.unet)
        return lambda *inputs: torch.cat(
            [branches[i](*row) for i, row in enumerate(zip(*(y.split(1) for y in inputs)))]
        )


def hold_in_half(network: nn.Module) -> None:
    """Keep the weights in float16 and widen those of each layer to float32 while it runs."""

    def widen(layer: nn.Module, _) -> None:
        for parameter, half in layer.held:
            parameter.data = half.float()

    def narrow(layer: nn.Module, *_) -> None:
        for parameter, half in layer.held:
            parameter.data = half

    for layer in network.half().modules():
        layer.held = [(parameter, parameter.data) for parameter in layer.parameters(recurse=False)]
        if layer.held:
            layer.register_forward_pre_hook(widen)
            layer.register_forward_hook(narrow, always_call=True)
