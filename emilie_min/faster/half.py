"""Half precision that overflows in the decoder, where activations are largest."""

import warnings

import torch
from torch import Tensor

from ..vae import AutoencoderKL


class HalfAutoencoderKL(AutoencoderKL):
    """An autoencoder in half precision that decodes again in float32, with a warning, where numbers overflowed."""

    def decode(self, z: Tensor) -> Tensor:
        image = super().decode(z)
        if z.dtype == torch.float32 or image.isfinite().all():
            return image
        warnings.warn(f"decoding overflowed in {z.dtype}: decoded again in float32", stacklevel=2)
        try:
            return self.float().decode(z.float())
        finally:
            self.to(z.dtype)
