"""On a CPU `load(compile=True)`: the readable network's results to rounding, with less work.

What an edit does not change from step to step is computed once: the text's keys and values and, for all steps, the
timesteps' embeddings, which become biases of convolutions. Branches that see the same picture are one until the text
tells them apart, and a branch that guidance cancels out is not run. Weights lie channels last, so that a feature map
and a list of cells are the same memory. Products add into their residuals. Feed-forward layers work through rows that
fit the CPU's cache, and convolutions after an upsampling leave out what they would compute on copies. What each of
these brought: `notebooks/speed/README.md`.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from operator import is_not

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import sampling
from ..attention import attention
from ..emilie import Editor
from ..sampling import Scale
from ..unet import ResBlock, SpatialTransformer, UNetModel, Upsample, timestep_embedding
from .deepcache import SHALLOW, DeepCache
from .graph import network_state

GEMM_MAX_CELLS = 256  # cells of a batch at which a convolution's time on a CPU is its weights'
FF_CHUNK = 1024  # of a feed-forward layer at once: 10 MB of the widest layer's features
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.6e-1}  # relative error that rounding explains


class FastEditor(Editor):
    """An `Editor` whose branches take the fast path; its networks stay what they are and can be used as ever.

    The fast path is a second forward pass over the same weights. So it is compared with the network that it stands for
    when it is made, and again whenever a layer's code or weights are others. Where they differ a warning says so, and
    the network itself runs; so it does while it has hooks.
    """

    compiled = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fast = FastUNet(self.unet)
        self.biases: dict[float, Tensor] = {}  # of every noise level so far
        self.keys: tuple[list[Tensor], Tensor] | None = None  # texts as rows, and their keys and values
        self.compared: tuple[Hashable, bool] = (None, False)  # the network's state then, and whether they agreed
        self.stands_in()

    def stands_in(self) -> bool:
        """Whether the fast path may run in the network's place: they agree on one small latent."""
        unet = self.unet.unet if isinstance(self.unet, DeepCache) else self.unet
        state = network_state(unet)
        if state is not None and self.compared[0] != state:
            self.biases, self.keys = {}, None
            apart = self.fast.distance(unet, self.config.unet.context_dim, self.dtype)
            if not apart <= ROUNDING[self.dtype]:
                warnings.warn(
                    f"the fast path is off by {apart:.2g} of what the network gives: somebody changed a layer, so the "
                    "network itself runs",
                    stacklevel=2,
                )
            self.compared = state, apart <= ROUNDING[self.dtype]
        return state is not None and self.compared[1]

    def denoise(
        self,
        x: Tensor,
        sigma: Scale,
        z_img: Tensor,
        cond: Tensor,
        uncond: Tensor,
        text_scale: Scale,
        image_scale: Scale,
    ) -> Tensor:
        """As `Editor.denoise`, without the branches that cancel out in guidance."""
        text_one, image_one = (not isinstance(scale, Tensor) and scale == 1 for scale in (text_scale, image_scale))
        if not image_one:
            return super().denoise(x, sigma, z_img, cond, uncond, text_scale, image_scale)
        if text_one:
            return self.branches([x], sigma, [z_img], [cond])[0]
        cond, img_cond = self.branches([x, x], sigma, [z_img, z_img], [cond, uncond])
        return sampling.guide(cond, img_cond, img_cond, text_scale, image_scale)

    @torch.no_grad()
    def branches(
        self, x: Sequence[Tensor], sigma: Scale, seen: Sequence[Tensor], told: Sequence[Tensor]
    ) -> list[Tensor]:
        """As `Editor.branches`: rows that see the same are one until a text tells them apart, and what is the same at
        every step, a text's keys and values, is kept; in the plain way where the rows' noise levels differ."""
        levels = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1)
        if (levels != levels[0]).any() or not self.stands_in():
            return super().branches(x, sigma, seen, told)
        level, b, pairs = levels[0].item(), len(x[0]), [(id(y), id(z)) for y, z in zip(x, seen)]
        first = list(dict.fromkeys(pairs))
        z_t = [(y.float() / (level**2 + 1) ** 0.5).to(self.dtype) for y in x]
        unique = [pairs.index(pair) for pair in first]
        stacked = torch.cat([torch.cat([z_t[i], seen[i].to(self.dtype).expand_as(z_t[i])], dim=1) for i in unique])
        rows = tuple(first.index(pair) for pair in pairs)
        cache = self.unet if isinstance(self.unet, DeepCache) else None
        deep = None if cache is None or cache.is_full_step(len(x) * b) else cache.deep[cache.branch]
        eps, kept = self.fast(stacked, self.bias(level), self.told(told, b), rows, deep)
        if cache is not None:
            cache.deep[cache.branch] = kept
        return [y - level * e for y, e in zip(x, eps.float().chunk(len(x)))]

    def bias(self, sigma: float) -> Tensor:
        """What the timestep's embedding becomes, kept for every noise level."""
        if sigma not in self.biases:
            t = sampling.sigma_to_t(torch.tensor([sigma], dtype=torch.float64), self.log_sigmas).float()
            self.biases[sigma] = self.fast.biases(t, self.dtype)[0]
        return self.biases[sigma]

    def told(self, texts: Sequence[Tensor], b: int) -> Tensor:
        """What the texts become, kept while they are the same tensors."""
        if self.keys is None or self.keys[1].shape[0] != len(texts) * b or any(map(is_not, self.keys[0], texts)):
            rows = torch.cat([text.to(self.dtype).expand(b, -1, -1) for text in texts])
            self.keys = list(texts), self.fast.keys(rows)
        return self.keys[1]


class FastUNet(nn.Module):
    """`UNetModel` over the same weights, from each picture's rows to each branch's, with what an edit keeps given."""

    def __init__(self, unet: UNetModel):
        super().__init__()
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.time_embed, self.model_channels, self.out = unet.time_embed, unet.model_channels, unet.out
        self.resblocks, self.transformers = nn.ModuleList(), nn.ModuleList()
        self.input_blocks = nn.ModuleList(self.wrap(block) for block in unet.input_blocks)
        self.middle_block = self.wrap(unet.middle_block)
        self.output_blocks = nn.ModuleList(self.wrap(block) for block in unet.output_blocks)

    def wrap(self, block: nn.Module) -> nn.ModuleList:
        layers = nn.ModuleList()
        for layer in block:
            if isinstance(layer, ResBlock):
                self.resblocks.append(layer := FastResBlock(layer, len(self.resblocks)))
            elif isinstance(layer, SpatialTransformer):
                self.transformers.append(layer := FastTransformer(layer, len(self.transformers)))
            elif isinstance(layer, Upsample):
                layer = FastUpsample(layer)
            layers.append(layer)
        return layers

    def biases(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t: (n,) -> (n, sum of C'): of every step, what each ResBlock's first convolution adds, embedding and all."""
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(dtype))
        return torch.cat([block.conv.bias + block.emb_layers(emb) for block in self.resblocks], dim=1)

    def keys(self, context: Tensor) -> Tensor:
        """(kB, 77, D) -> (kB, 77, 2 sum of C): every transformer's keys and values."""
        attns = [block.attn2 for block in self.transformers]
        return torch.cat([layer(context) for attn in attns for layer in (attn.to_k, attn.to_v)], dim=2)

    @torch.no_grad()
    def distance(self, unet: UNetModel, context_dim: int, dtype: torch.dtype) -> float:
        """||ours - the network's|| / ||the network's||, of three branches of two small latents."""
        draw, side, rows = torch.Generator().manual_seed(0), 2 * 2**unet.num_downsamples, (0, 0, 1)
        x = torch.randn(2, unet.in_channels, side, side, generator=draw).to(dtype)
        t, context = torch.tensor([417.3]), torch.randn(len(rows), 77, context_dim, generator=draw).to(dtype)
        theirs = unet(x[list(rows)], t.expand(len(rows)), context).float()
        ours, _ = self(x, self.biases(t, dtype)[0], self.keys(context), rows)
        return ((ours.float() - theirs).norm() / theirs.norm()).item()

    def forward(
        self, x: Tensor, bias: Tensor, keys: Tensor, rows: tuple[int, ...], deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: (RB, 8, h, w), R pictures; bias: a row of `biases`; keys: of k branches; rows: each branch's picture.

        deep: None, or from an earlier call, to be used again. -> eps (kB, 4, h, w), deep.
        """
        biases = bias.split([block.conv.out_channels for block in self.resblocks])
        keys = keys.split([c for block in self.transformers for c in 2 * [block.attn2.to_k.out_features]], dim=2)
        b = keys[0].shape[0] // len(rows)

        def expand_to_branches(y: Tensor) -> Tensor:  # from the pictures' rows to the branches'
            if y.shape[0] == keys[0].shape[0]:
                return y
            return torch.cat([y[row * b : (row + 1) * b] for row in rows])

        def run(block: nn.ModuleList, x: Tensor) -> Tensor:
            for layer in block:
                if isinstance(layer, FastResBlock):
                    x = layer(x, biases[layer.index])
                elif isinstance(layer, FastTransformer):
                    x = layer(x, *keys[2 * layer.index : 2 * layer.index + 2], expand_to_branches)
                else:
                    x = layer(x)
            return x

        skips = []
        for block in self.input_blocks if deep is None else self.input_blocks[:SHALLOW]:
            x = run(block, x)
            skips.append(x)
        if deep is None:
            x = run(self.middle_block, x)
            for block in self.output_blocks[:-SHALLOW]:
                x = run(block, torch.cat([expand_to_branches(x), expand_to_branches(skips.pop())], dim=1))
            deep = expand_to_branches(x)
        x = deep
        for block in self.output_blocks[-SHALLOW:]:
            x = run(block, torch.cat([x, expand_to_branches(skips.pop())], dim=1))
        return self.out(x), deep


class FastResBlock(nn.Module):
    """`ResBlock` whose timestep's embedding comes as the first convolution's bias."""

    def __init__(self, layer: ResBlock, index: int):
        super().__init__()
        self.index = index
        self.norm1, _, self.conv = layer.in_layers
        self.emb_layers = layer.emb_layers
        self.norm2, _, _, self.conv2 = layer.out_layers
        self.skip_connection = layer.skip_connection

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # (B, C, H, W), (C',) -> (B, C', H, W)
        h = conv3x3(F.silu(self.norm1(x), inplace=True), self.conv.weight, bias)
        h = conv3x3(F.silu(self.norm2(h), inplace=True), self.conv2.weight, self.conv2.bias)
        return h.add_(self.skip_connection(x))


class FastUpsample(nn.Module):
    """`Upsample` in 4/9 of its arithmetic: of the 3x3 cells under the kernel some are copies, so their weights add."""

    def __init__(self, layer: Upsample):
        super().__init__()
        self.conv = layer.conv

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        b, c, height, width = x.shape
        out = x.new_empty(b, c, 2 * height, 2 * width).to(memory_format=torch.channels_last)
        taps = self.conv.weight.permute(0, 2, 3, 1)  # (C, 3, 3, C), as it lies in memory
        for i in (0, 1):  # an even row sees the cell above it and its own, an odd one its own and the one below
            rows = torch.stack(fold_taps(*taps.unbind(1), i), dim=1)
            for j in (0, 1):
                kernel = torch.stack(fold_taps(*rows.unbind(2), j), dim=2).permute(0, 3, 1, 2)  # (C, C, 2, 2)
                out[:, :, i::2, j::2] = F.conv2d(F.pad(x, (1 - j, j, 1 - i, i)), kernel, self.conv.bias)
        return out


class FastTransformer(nn.Module):
    """`SpatialTransformer` on keys and values that are given; queries, keys and values of its own in one product."""

    def __init__(self, layer: SpatialTransformer, index: int):
        super().__init__()
        block = layer.transformer_blocks[0]  # depth is 1
        self.index, self.norm, self.heads = index, layer.norm, block.attn1.heads
        self.proj_in, self.proj_out = layer.proj_in, layer.proj_out
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1, self.attn2, self.up, self.down = block.attn1, block.attn2, block.ff.net[0].proj, block.ff.net[2]
        own = (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v)
        self.qkv = nn.Parameter(torch.cat([linear.weight.data for linear in own]), requires_grad=False)
        for linear, weight in zip(own, self.qkv.data.chunk(3)):  # the readable layers look into it
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, expand_to_branches: Callable[[Tensor], Tensor]) -> Tensor:
        """x: (B, C, H, W) channels last; k, v: (kB, 77, C) -> (kB, C, H, W) channels last."""
        height, channels = x.shape[2], x.shape[1]
        h = cells(self.norm(x))
        h = F.linear(h, self.proj_in.weight[:, :, 0, 0], self.proj_in.bias)
        qkv = F.linear(self.norm1(h), self.qkv).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = add_linear(h, attention(*qkv).transpose(1, 2).flatten(2), self.attn1.to_out[0])
        del qkv
        h, x = expand_to_branches(h), expand_to_branches(x)  # from here on the text makes a difference
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.attn2.to_q(self.norm2(h)), k, v))
        h = add_linear(h, attention(q, k, v).transpose(1, 2).flatten(2), self.attn2.to_out[0])
        (value, gate), (value_bias, gate_bias) = self.up.weight.chunk(2), self.up.bias.chunk(2)
        rows = h.view(-1, channels)
        for part in rows.split(FF_CHUNK):
            y = self.norm3(part)
            y = F.linear(y, value, value_bias).mul_(F.gelu(F.linear(y, gate, gate_bias)))
            part.addmm_(y, self.down.weight.t()).add_(self.down.bias)
        x = cells(x).reshape(-1, channels).addmm_(rows, self.proj_out.weight[:, :, 0, 0].t()).add_(self.proj_out.bias)
        return x.view(*h.shape).transpose(1, 2).unflatten(2, (height, -1))


def fold_taps(first: Tensor, middle: Tensor, last: Tensor, odd: int) -> tuple[Tensor, Tensor]:
    """Three weights as two, where the middle's cell is a copy of a neighbour's."""
    return (first + middle, last) if odd else (first, middle + last)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution; of a few cells as one product, which does not lay the weights out anew every time."""
    b, c, height, width = x.shape
    if b * height * width > GEMM_MAX_CELLS:
        return F.conv2d(x, weight, bias, padding=1)
    y = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    under = [y[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    y = F.linear(torch.cat(under, dim=3), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return y.permute(0, 3, 1, 2)


def cells(x: Tensor) -> Tensor:  # (B, C, H, W) channels last -> (B, HW, C), the same memory
    return x.flatten(2).transpose(1, 2)


def add_linear(h: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:  # h + linear(x), in the memory of h
    h.view(-1, h.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), linear.weight.t()).add_(linear.bias)
    return h
