"""`load(..., low_memory=True)`: a 512 px edit on a card of 4 GB, or in half the memory of a computer.

On a GPU guidance's branches run one after another, and the three networks wait in main memory and take turns on the
card. On a CPU, where weights are what fills the memory, every weight is held in float16 and widened while its layer
runs, so that the arithmetic stays float32: the same numbers as without, where the file is float16, which `emilie
convert` writes. What it costs: `notebooks/speed/README.md`.
"""

import torch
from torch import Tensor, nn

from ..emilie import Editor
from ..sampling import Scale
from .deepcache import DeepCache


class LowMemoryEditor(Editor):
    """An `Editor` of which one network at a time is on the device, and one branch at a time in it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sequential = self.device.type != "cpu"
        if self.device.type == "cpu" and self.dtype == torch.float32:
            for network in (self.unet, self.vae, self.text):
                layerwise_cast(network)

    def bring(self, needed: nn.Module) -> None:
        """A network onto the device, after the others have left it; where it is there already nothing moves."""
        if self.device.type != "cpu" and next(needed.parameters()).device.type != self.device.type:
            for network in (self.network, self.vae, self.text):
                if network is not needed:
                    network.to("cpu")
            needed.to(self.device)

    @property
    def network(self) -> nn.Module:
        """The UNet itself, also while `DeepCache` stands before it."""
        return self.unet.unet if isinstance(self.unet, DeepCache) else self.unet

    def encode(self, image: Tensor) -> Tensor:
        self.bring(self.vae)
        return super().encode(image)

    def decode(self, z: Tensor) -> Tensor:
        self.bring(self.vae)
        return super().decode(z)

    def context(self, texts: list[str]) -> Tensor:
        self.bring(self.text)
        return super().context(texts)

    def branches(self, x: list[Tensor], sigma: Scale, seen: list[Tensor], told: list[Tensor]) -> list[Tensor]:
        """As `Editor.branches`, on a GPU one branch after another."""
        self.bring(self.network)
        if not self.sequential:
            return super().branches(x, sigma, seen, told)
        denoised = []
        for i, branch in enumerate(zip(x, seen, told)):
            if isinstance(self.unet, DeepCache):
                self.unet.branch = i
            own_x, picture, text = branch
            denoised += super().branches([own_x], sigma, [picture], [text])
        return denoised


def layerwise_cast(network: nn.Module) -> None:
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
