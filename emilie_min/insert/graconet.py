"""GracoNet (Zhou et al., ECCV 2022): where in a base picture an inset would stand well, and how large.

Learned graph completion: 84 nodes that describe the base, grids of 2x2, 4x4 and 8x8 cells, and one that describes the
inset; attention completes the inset's node by the base's, and a random code picks one of the places that it allows.
Attribute paths are the released checkpoint's keys. Evaluation mode, in which a network is built, is all of inference.

Pictures are PIL or uint8 (S, S, 3), their masks "L" or uint8 (S, S), 255 where the inset is. A box is (x, y, w, h).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import names, reading
from ..checkpoint.schema import parse
from ..errors import CheckpointError, ImageError, note, printable
from ..sampling import noise_stream

Box = tuple[int, int, int, int]

SIZE = 256  # px: the side of the square pictures that the released network sees
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
CONVOLUTIONS = (2, 2, 3, 3)  # of VGG-16's first four blocks

DROPPED = {  # what the training file holds beside the generator's way at inference
    "the discriminator": r"discriminator\..*",
    "what encodes a true composite into a latent code, in training": r"(generator\.)?(latent_head|vae_enc)\..*",
}


def convolve(channels: Sequence[int]) -> list[nn.Module]:
    """3x3 convolutions from each number of channels to the next, each with a norm and a ReLU."""
    layers: list[nn.Module] = []
    for a, b in zip(channels, channels[1:]):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return layers


class Nodes(nn.Module):
    """Features (B, C, h, w) as nodes, one a cell of an n x n grid, row by row: (B, n * n, C)."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.features = nn.Sequential(*convolve([width] * 4), nn.AdaptiveAvgPool2d(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(2).mT


class Head(nn.Module):
    """The nodes of several grids, one grid after the other."""

    def __init__(self, width: int, grids: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList(Nodes(width, n) for n in grids)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], 1)


class PositionedAttention(nn.Module):
    """Attention whose keys and values know which node they are of: a learned vector for each head and node is added."""

    def __init__(self, heads: int, nodes: int, dim: int):
        super().__init__()
        self.pos_k, self.pos_v = nn.Embedding(heads * nodes, dim), nn.Embedding(heads * nodes, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q: (B, heads, N, d); k, v: (B, heads, M, d) -> like q, and the weights (B, heads, N, M)."""
        k, v = k + self.pos_k.weight.view(k.shape[1:]), v + self.pos_v.weight.view(v.shape[1:])
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return weights @ v, weights


class MultiHeadAttention(nn.Module):
    def __init__(self, width: int, heads: int, nodes: int, dim: int):
        super().__init__()
        self.heads = heads
        self.W_Q, self.W_K, self.W_V = (nn.Linear(width, heads * dim) for _ in range(3))
        self.att = PositionedAttention(heads, nodes, dim)
        self.W_O, self.norm = nn.Linear(heads * dim, width), nn.LayerNorm(width)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        split = [
            w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for w, x in zip((self.W_Q, self.W_K, self.W_V), (q, k, k))
        ]
        out, weights = self.att(*split)
        return self.norm(self.W_O(out.transpose(1, 2).flatten(2)) + q), weights


class Completion(nn.Module):
    """The inset's node (B, 1, C), completed by the base's (B, M, C); and how it looked at them, (B, heads, 1, M)."""

    def __init__(self, width: int, heads: int, nodes: int, dim: int):
        super().__init__()
        self.att = MultiHeadAttention(width, heads, nodes, dim)

    def forward(self, inset: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        return self.att(inset, base)


class Regressor(nn.Module):
    """(..., D) -> (..., 3), before the squashing to (0, 1)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        inner = [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.5)]
        self.regressor = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.5), *inner, nn.Linear(hidden, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.regressor(x)


class GracoNet(nn.Module):
    """The generator as inference needs it; the defaults are the released sizes.

    widths: of VGG's blocks; heads, dim: of the attention; grids: of the base's nodes; latent: numbers of a code;
    hidden: of the regressor; size: side of the square pictures, px.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        heads: int = 8,
        dim: int = 64,
        grids: Sequence[int] = (2, 4, 8),
        latent: int = 1024,
        hidden: int = 1024,
        size: int = SIZE,
    ):
        super().__init__()
        self.latent, self.size = latent, size
        blocks: list[nn.Module] = []
        for before, width, n in zip((4, *widths), widths, CONVOLUTIONS):
            blocks += [*convolve([before] + [width] * n), nn.MaxPool2d(2)]
        self.shared_net = nn.Sequential(*blocks)
        self.fg_head, self.bg_head = Head(widths[-1], (1,)), Head(widths[-1], grids)
        self.att = Completion(widths[-1], heads, sum(n * n for n in grids), dim)
        self.regress_net = Regressor(widths[-1] + latent, hidden)
        self.eval()

    def forward(self, base: np.ndarray, inset: np.ndarray, mask: np.ndarray, latent: Tensor) -> Tensor:
        """Prepared pictures, see `prepare`, and k latent codes (k, L) of unit normal numbers -> (k, 3).

        scale, x, y in (0, 1): see `box`. What comes before the code is computed once for all.
        """
        pictures = (self.seen(base, np.zeros_like(mask)), self.seen(inset, mask))
        completed, _ = self.complete(*pictures)
        codes = latent.to(completed)[None]
        return self.regress(completed, codes)[0]

    def complete(self, base: Tensor, inset: Tensor) -> tuple[Tensor, Tensor]:
        """Both (B, 4, S, S) -> the inset's completed node (B, 1, C), and the attention (B, heads, 1, M)."""
        base, inset = self.shared_net(torch.cat([base, inset])).chunk(2)
        return self.att(self.fg_head(inset), self.bg_head(base))

    def regress(self, completed: Tensor, codes: Tensor) -> Tensor:
        """(B, 1, C) and (B, k, L) -> (B, k, 3)."""
        raw = self.regress_net(torch.cat([completed.expand(-1, codes.shape[1], -1), codes], -1))
        return raw.tanh() / 2 + 0.5

    def seen(self, picture: np.ndarray, mask: np.ndarray) -> Tensor:
        """A prepared picture and mask as (1, 4, S, S): normalised RGB, and the mask in [0, 1]."""
        return to_input(torch.from_numpy(np.array(picture))[None], torch.from_numpy(np.array(mask))[None]).to(
            self.shared_net[0].weight
        )

    @torch.no_grad()
    def propose(self, base: Image.Image, inset: Image.Image, mask: Image.Image, n: int, seed: int = 0) -> list[Box]:
        """n boxes for the inset, in pixels of the base. The code of each follows from the seed and its number alone.

        Whatever has this method can take GracoNet's place. Raises ImageError.
        """
        draw = noise_stream((1, self.latent), seed, "insert")
        trans = self(*prepare(base, inset, mask, self.size), torch.cat([draw() for _ in range(n)]))
        return [box(t, base.size, inset.size) for t in trans]


def to_input(rgb: Tensor, mask: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) and (B, S, S) -> what the shared network sees, (B, 4, S, S) float32."""
    rgb = (rgb.float() / 255 - rgb.new_tensor(MEAN, dtype=torch.float)) / rgb.new_tensor(DEVIATION, dtype=torch.float)
    return torch.cat([rgb, mask.float()[..., None] / 255], -1).permute(0, 3, 1, 2)


# ---- pictures in, boxes out


def narrower(base: tuple[int, int], inset: tuple[int, int]) -> bool:
    """Whether an inset of (width, height) is narrower than its base, so that its height is what bounds its size."""
    return base[0] / base[1] > inset[0] / inset[1]


def prepare(
    base: Image.Image, inset: Image.Image, mask: Image.Image, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the network sees: uint8 (S, S, 3), (S, S, 3), (S, S).

    The base is squeezed to a square; the inset and its mask as the base is, so that both lose their shape alike, and
    put into the middle of black. Pillow's bilinear resizing, whose last grey level depends on its version (see
    python-pillow/Pillow#9549). Raises ImageError for an inset of which that leaves nothing.
    """
    (bw, bh), (w, h) = base.size, inset.size
    if narrower(base.size, inset.size):
        width, height = size * w * bh // (h * bw), size
    else:
        width, height = size, size * h * bw // (w * bh)
    if not width or not height:
        raise ImageError(f"an inset of {w}x{h} px is too thin for a base of {bw}x{bh} px: crop or pad it")
    corner = (size - width) // 2, (size - height) // 2

    def letterboxed(image: Image.Image) -> np.ndarray:
        out = Image.new(image.mode, (size, size))
        out.paste(image.resize((width, height), Image.Resampling.BILINEAR), corner)
        return np.array(out)

    squeezed = np.array(base.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    return squeezed, letterboxed(inset.convert("RGB")), letterboxed(mask.convert("L"))


def box(trans: Tensor | Sequence[float], base: tuple[int, int], inset: tuple[int, int]) -> Box:
    """(scale, x, y) in (0, 1) to (x, y, w, h) in pixels of the base; both sizes (width, height).

    scale 1 is the largest inset that fits, and x, y go from one edge to the other. Rounding can carry a box over the
    edge by a pixel; it is cut off there, which is told.
    """
    scale, x, y = (float(v) for v in trans)
    (bw, bh), (w, h) = base, inset
    height, width = (bh * scale, bh * scale * w / h) if narrower(base, inset) else (bw * scale * h / w, bw * scale)
    left, top = min(max(round((bw - width) * x), 0), bw - 1), min(max(round((bh - height) * y), 0), bh - 1)
    size = max(round(width), 1), max(round(height), 1)
    right, bottom = min(left + size[0], bw), min(top + size[1], bh)
    if (right - left, bottom - top) != size:
        note(
            f"a proposal of {size[0]}x{size[1]} px at {left},{top} passes the edge of the picture and is cut off there"
        )
    return left, top, right - left, bottom - top


def placed(mask: Image.Image, box: Box, base: tuple[int, int]) -> Image.Image:
    """An inset's mask in a box, on black of the base's size, PIL "L"."""
    out = Image.new("L", base)
    out.paste(mask.convert("L").resize(box[2:], Image.Resampling.BILINEAR), box[:2])
    return out


def paste(base: Image.Image, inset: Image.Image, mask: Image.Image, box: Box) -> Image.Image:
    """The plain composite, which is all that GracoNet alone does: the inset in its box, blended by its mask."""
    layer = Image.new("RGB", base.size)
    layer.paste(inset.convert("RGB").resize(box[2:], Image.Resampling.BILINEAR), box[:2])
    share = np.asarray(placed(mask, box, base.size), np.float64)[..., None] / 255
    blend = np.asarray(layer) * share + np.asarray(base.convert("RGB")) * (1 - share)
    return Image.fromarray(blend.astype(np.uint8))


# ---- weight files


def load(path: str | Path, device: torch.device | str = "cpu") -> GracoNet:
    """A network from the training script's file (11.pth), its generator's tensors alone, or the small model's file.

    Strict, safe, one tensor at a time; sizes other than the released ones stand as JSON under "config" in the metadata
    of a .safetensors file. Raises CheckpointError, which says what a file is that is not GracoNet's.
    """
    entries = reading.index(path, inside="model")
    prefix = "generator." if any(key.startswith("generator.") for key in entries) else ""
    if f"{prefix}shared_net.0.weight" not in entries:
        raise CheckpointError(f"{path} is not GracoNet's: it is {what_it_is(path, entries)}")
    notes = reading.metadata(path) or {}
    try:
        sizes = parse(notes.get("config", "{}"))
        with torch.device("meta"):
            net = GracoNet(**sizes)
    except Exception as error:  # whatever wrong sizes lead to
        raise CheckpointError(
            f"{printable(path)}: no network has the sizes {printable(notes.get('config'), 200)}"
        ) from error
    wanted = {name: prefix + name for name in net.state_dict()}
    reading.fit(net, wanted, entries, DROPPED, str(path))
    reader = reading.Reader(path, entries)
    state = {}
    for name, key in wanted.items():
        state[name] = reader.get(key, device, torch.float32 if entries[key].dtype.is_floating_point else None)
        reader.finite(key, state[name], str(path))
    net.load_state_dict(state, strict=True, assign=True)
    return net.requires_grad_(False)


def what_it_is(path: str | Path, entries: dict[str, reading.Entry]) -> str:
    """What a weight file without GracoNet's tensors holds, for an error."""
    shapes = {key: entry.shape for key, entry in entries.items()}
    if {"text_model", "vision_model"} <= {key.partition(".")[0] for key in entries}:
        return "a CLIP"
    known = names.tell_tale(shapes, reading.metadata(path))
    if known is not None:
        return known.partition(": ")[0]
    if config := reading.detect_config(entries):
        return f"an editor's weights ({config}), for --weights"
    if any(key.startswith("features.0.") for key in entries):
        return "an image classifier, such as the VGG-16 that GracoNet's training starts from"
    first = ", ".join(list(entries)[:2])
    return f"a file of {len(entries)} tensors, such as {printable(first, 120)}"
