"""Train a small GracoNet on pairs of the small world.

    python -m emilie_min.insert.train_graconet weights/toy-graconet.safetensors    # from nothing: 10 minutes of a core
    python -m emilie_min.insert.train_graconet OUT --weights weights/toy-graconet.safetensors --pairs 16000 --rate 3e-4

What is right is known, so neither the discriminator nor the second, variational path of GracoNet's training is needed.
Every pair has K = 16 latent codes, for which all before the code is computed once, and F free places. With e(k, f), the
error of proposal k against place f (smooth L1 of middle and size),

    loss = mean over k of min over f of e(k, f)      every proposal is sound
         + mean over f of min over k of e(k, f)      every free place is found: without it, one place whatever the code
         + 0.1 mean((|raw| - 2.3)+ ^2)               raw, before tanh, stays where something can be learned

Insets that fill a corner ask for x or y of exactly 0 or 1; without the third term tanh saturates on them and never
comes back. The code's first weights start larger, else a wide band of codes lies between two places; no dropout.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

from ..checkpoint.writing import write_tensors
from ..toy import world
from . import graconet, pairs

SIZES: dict = {
    "widths": (8, 16, 32, 64), "heads": 8, "dim": 8, "grids": (2, 4, 8), "latent": 16, "hidden": 256, "size": world.SIZE
}  # fmt: skip
CODES, BATCH = 16, 32  # latent codes of a pair, pairs of a step
FLAT = 2.3  # beyond it tanh is within 0.02 of its end
SHARP = 5.0  # by how much the latent code's first weights are enlarged
BETA = 2 / world.CELL  # where the smooth L1 bends, in places


def middles(boxes: Tensor) -> Tensor:
    """Left, top, right, bottom (..., 4) in px to middle and size, in units of a place."""
    start, end = boxes.chunk(2, -1)
    return torch.cat([(start + end) / 2, end - start], -1) / world.CELL


def proposed(trans: Tensor, inset: Tensor) -> Tensor:
    """`graconet.box` without rounding, for square bases: (B, k, 3) and insets' (width, height) (B, 2) -> (B, k, 4)."""
    size = world.SIZE * trans[..., :1] * (inset / inset.amax(1, keepdim=True))[:, None]
    start = (world.SIZE - size) * trans[..., 1:]
    return torch.cat([start, start + size], -1)


def loss(boxes: Tensor, right: Tensor) -> Tensor:
    """The first two terms. boxes: (B, k, 4); right: (B, 4 places, 4), NaN where a place is taken; both in px."""
    taken = right.isnan().any(-1)
    off = middles(boxes)[:, :, None] - middles(right.nan_to_num())[:, None]  # (B, k, 4 places, 4)
    errors = F.smooth_l1_loss(off, torch.zeros_like(off), beta=BETA, reduction="none").mean(-1)
    errors = errors.masked_fill(taken[:, None], float("inf"))
    return errors.amin(2).mean() + errors.amin(1)[~taken].mean()


class Pairs(Dataset):
    """Prepared pairs: base, inset, mask, the inset's size, the right boxes."""

    def __init__(self, first: int, n: int, size: int):
        self.first, self.n, self.size = first, n, size

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple:
        seed = self.first + i
        (how,) = random.Random(f"variant {seed}").choices(list(pairs.VARIANTS), list(pairs.VARIANTS.values()))
        p = pairs.pair(seed).varied(how)
        ready = graconet.prepare(p.base, p.inset, p.mask, self.size)
        return *map(torch.from_numpy, ready), torch.tensor(p.inset.size).float(), pairs.right_boxes(p)


def objective(net: graconet.GracoNet, batch: Sequence[Tensor]) -> Tensor:
    """The loss of a batch of prepared pairs. Both pictures share a batch, and so the statistics, of the norms."""
    base, inset, mask, size, right = batch
    pictures = (graconet.to_input(base, torch.zeros_like(mask)), graconet.to_input(inset, mask))
    completed, _ = net.complete(*(x.contiguous(memory_format=torch.channels_last) for x in pictures))
    codes = torch.randn(len(base), CODES, net.latent)
    raw = net.regress_net(torch.cat([completed.expand(-1, CODES, -1), codes], -1))
    flat = (raw.abs() - FLAT).clamp(0).square().mean()
    return loss(proposed(raw.tanh() / 2 + 0.5, size), right) + 0.1 * flat


def train(out: Path, n: int = 160_000, rate: float = 3e-3, weights: Path | None = None, first: int = 0) -> None:
    """Steps of AdamW over n pairs, from seed `pairs.FIRST_SEED + first` on, in one cycle of the learning rate."""
    torch.manual_seed(first)
    if weights is None:
        net = graconet.GracoNet(**SIZES)
        with torch.no_grad():
            net.regress_net.regressor[0].weight[:, SIZES["widths"][-1] :] *= SHARP
    else:
        net = graconet.load(weights).requires_grad_(True)
    net = net.train().to(memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer, steps = torch.optim.AdamW(net.parameters(), rate, weight_decay=1e-4), n // BATCH
    schedule = OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    started, smooth = time.monotonic(), 0.0
    for step, batch in enumerate(DataLoader(Pairs(pairs.FIRST_SEED + first, n, net.size), BATCH, drop_last=True)):
        error = objective(net, batch)
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smooth = error.item() if step == 0 else 0.98 * smooth + 0.02 * error.item()
        if step % 100 == 99:
            print(f"{(step + 1) * BATCH} pairs, {time.monotonic() - started:.0f} s: loss {smooth:.4f}", flush=True)
        if step % 500 == 499 or step == steps - 1:
            save(net, out)


def save(net: graconet.GracoNet, path: Path) -> None:
    """In float16, with the sizes, which do not all follow from the shapes, as JSON."""
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}
    write_tensors(state, path, {"config": json.dumps(SIZES)})


def main(argv: list[str] | None = None) -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="train_graconet", description=__doc__, formatter_class=about)
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--weights", type=Path, help="go on from these (default: from nothing)")
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="leave out N pairs, as those seen before")
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate (default: 3e-3)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    train(args.out, args.pairs, args.rate, args.weights, args.first)


if __name__ == "__main__":
    main()
