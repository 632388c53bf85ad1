"""The KL autoencoder of latent diffusion (Rombach et al. 2022, Sec. 3.1); the EMILIE paper calls it a VQ-VAE.

Attribute paths are the released checkpoint's keys below `first_stage_model.`. Latents here are unscaled: the factor
that brings them to unit variance for diffusion, 0.18215 in the released model, is the caller's.
"""

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import attention
from .config import VAEConfig
from .errors import ImageError


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)  # not the UNet's 1e-5


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H, W)
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = F.silu(self.norm2(h), inplace=True)  # three of the widest feature maps live at once, not four
        h = self.conv2(h)
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Self-attention over the cells of a feature map, one head as wide as the channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b 1 (h w) c").contiguous() for conv in (self.q, self.k, self.v))
        return x + self.proj_out(rearrange(attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, unlike the UNet's


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, h, w)
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels to the moments of the latent: at each level some blocks, then half the size."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        c, groups = config.ch, config.num_groups
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down: Any = nn.ModuleList()  # of levels, whose parts have names
        channels = c
        for i, mult in enumerate(config.ch_mult):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                level.block.append(ResnetBlock(channels, mult * c, groups))
                channels = mult * c
            if i < len(config.ch_mult) - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = Middle(channels, groups)
        self.norm_out = norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 8, H/8, W/8)
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent to pixels. `up` is numbered like the encoder's `down`, so it is walked from its end."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        c, groups = config.ch, config.num_groups
        channels = config.ch_mult[-1] * c
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, groups)
        levels = []
        for i, mult in reversed(list(enumerate(config.ch_mult))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                level.block.append(ResnetBlock(channels, mult * c, groups))
                channels = mult * c
            if i > 0:
                level.upsample = Upsample(channels)
            levels.append(level)
        self.up: Any = nn.ModuleList(reversed(levels))
        self.norm_out = norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (B, 4, h, w) -> (B, 3, 8h, 8w)
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Images to latents of 1/factor the size and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.factor = 2 ** (len(config.ch_mult) - 1)  # 8 in the released model
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | image). image: (B, 3, H, W) in [-1, 1] -> two of (B, 4, H/8, W/8), unscaled.

        Raises ImageError where a side is no multiple of the autoencoder's factor.
        """
        if image.shape[-2] % self.factor or image.shape[-1] % self.factor:
            size = f"{image.shape[-1]}x{image.shape[-2]} px"
            raise ImageError(
                f"an image of {size} does not fit this autoencoder: give sides that are multiples of {self.factor}"
            )
        return self.quant_conv(self.encoder(image)).chunk(2, dim=1)

    def encode(self, image: Tensor) -> Tensor:
        """The posterior's mode, which is its mean, unscaled. (B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8)."""
        return self.moments(image)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latent (B, 4, h, w) -> image (B, 3, 8h, 8w), about [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(z))
