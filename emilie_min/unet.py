"""The denoising UNet of latent diffusion (Rombach et al. 2022, Sec. 3.3) as InstructPix2Pix and Stable Diffusion 1.x
use it. Every attribute path below is the released checkpoint's key, so weights load without renaming.

The released model, with c = 320 channels, block by block (R: ResBlock, T: SpatialTransformer):

    input_blocks   0 conv    1 R T  c     2 R T  c     3 down     64x64 latent -> 32x32
                             4 R T 2c     5 R T 2c     6 down            32x32 -> 16x16
                             7 R T 4c     8 R T 4c     9 down            16x16 -> 8x8
                            10 R   4c    11 R   4c
    middle_block   R T R 4c
    output_blocks  0 R       1 R          2 R   up              each takes the matching input block's
                   3 R T     4 R T        5 R T up              output as further channels
                   6 R T     7 R T        8 R T up
                   9 R T    10 R T       11 R T

What is easy to get wrong, here and around it, and the test that guards it (in tests/method where nothing else is said):

    z_img is stacked unscaled, z_t over sqrt(1 + sigma^2)      test_what_the_network_is_given, test_denoise
    the branch without a picture sees zeros, and is told ""    test_denoise
    timesteps are fractional                                   test_what_the_network_is_given, test_timestep_embedding
    cosines stand before sines in a timestep's embedding       test_timestep_embedding
    GroupNorm's epsilon: 1e-6 in T and autoencoder, else 1e-5  test_group_norms_have_two_epsilons
    downsampling pads all sides here, two in the autoencoder   test_the_two_downsamplings_pad_differently
    GEGLU's second half is the gate; its GELU is exact         test_unet_block_by_block
    skips are popped, and come behind in the channels          test_unet_block_by_block
    encoding gives the posterior's mode, unscaled              test_what_encode_and_decode_scale
    the text is CLIP's last state, after its final norm        test_text
    inference takes the averaged weights, if there are any     test_raw_weights_are_another_model
    ... whose names in the file have lost their dots           test_ema_names_have_lost_their_dots
    the original rounds pictures down to 8 bits                test_truncation_is_half_a_level_darker, in tests/canvas
    f is a ratio of magnitudes: signed means can cancel        test_f_is_a_ratio_of_mean_magnitudes
    a gated step keeps the outside to rounding, not the bit    test_masked_trajectory
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import attention
from .config import UNetConfig
from .errors import ImageError


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of the timestep, which may be fractional. t: (B,) in [0, 999] -> (B, dim), cosines first, float32."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    args = t[:, None].float() * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions with the timestep's embedding added between them."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels, eps=1e-5), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # dropout in the original: keeps the convolution's key at 3
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # (B, C, H, W), (B, E) -> (B, C', H, W)
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Multi-head attention from x to context, or to x itself when no context is given."""

    def __init__(self, query_dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim), nn.Identity())  # Identity: dropout's key

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # (B, N, C), (B, M, D) -> (B, N, C)
        context = x if context is None else context
        q, k, v = (
            rearrange(y, "b n (heads d) -> b heads n d", heads=self.heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(attention(q, k, v), "b heads n d -> b n (heads d)"))


class GEGLU(nn.Module):
    """A linear layer whose second half gates its first (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N, C')
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))  # Identity: dropout's key

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each behind a LayerNorm and added to its input."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (B, N, C), (B, 77, D) -> (B, N, C)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the cells of a feature map."""

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # not the ResBlock's 1e-5
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, context_dim, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (B, C, H, W), (B, 77, D) -> (B, C, H, W)
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)  # symmetric, unlike the autoencoder's

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands the timestep's embedding and the text to the layers that want them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """eps(z_t, t, y): the noise in a latent. With 8 input channels z_t comes stacked on the image latent z_img."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c, groups, emb = config.model_channels, config.num_groups, 4 * config.model_channels
        self.in_channels, self.out_channels, self.model_channels = config.in_channels, config.out_channels, c
        self.num_downsamples = len(config.channel_mult) - 1

        def res(channels: int, out: int) -> ResBlock:
            return ResBlock(channels, emb, out, groups)

        def attend(channels: int, level: int) -> list[nn.Module]:
            if 2**level not in config.attention_resolutions:
                return []
            return [SpatialTransformer(channels, config.context_dim, config.num_heads, groups)]

        self.time_embed = nn.Sequential(nn.Linear(c, emb), nn.SiLU(), nn.Linear(emb, emb))

        blocks: list[list[nn.Module]] = [[nn.Conv2d(config.in_channels, c, 3, padding=1)]]
        skips, ch = [c], c
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                blocks.append([res(ch, mult * c), *attend(mult * c, level)])
                ch = mult * c
                skips.append(ch)
            if level < self.num_downsamples:
                blocks.append([Downsample(ch)])
                skips.append(ch)
        self.input_blocks = nn.ModuleList(TimestepEmbedSequential(*block) for block in blocks)

        middle = SpatialTransformer(ch, config.context_dim, config.num_heads, groups)
        self.middle_block = TimestepEmbedSequential(res(ch, ch), middle, res(ch, ch))

        blocks = []
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for _ in range(config.num_res_blocks + 1):
                blocks.append([res(ch + skips.pop(), mult * c), *attend(mult * c, level)])
                ch = mult * c
            if level > 0:
                blocks[-1].append(Upsample(ch))
        self.output_blocks = nn.ModuleList(TimestepEmbedSequential(*block) for block in blocks)

        self.out = nn.Sequential(
            nn.GroupNorm(groups, ch, eps=1e-5), nn.SiLU(), nn.Conv2d(ch, config.out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x: (B, 8, h, w) or (B, 4, h, w), t: (B,) timesteps in [0, 999], context: (B, 77, D) -> eps (B, 4, h, w).

        Raises ImageError where a side of the latent cannot be halved as often as the UNet does.
        """
        height, width, n = *x.shape[-2:], 2**self.num_downsamples
        if height % n or width % n:
            raise ImageError(
                f"a latent of {height}x{width} does not fit this UNet: give sides that are multiples of {n}"
            )
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)
