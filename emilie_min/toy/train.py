"""Train the shipped models: an autoencoder on the procedural world, then UNet and text model on its edits, and once
more on its captions.

    python -m emilie_min.toy.train vae                # then put the printed scale_factor into configs/toy*.yaml
    python -m emilie_min.toy.train edit
    python -m emilie_min.toy.train export weights/toy.safetensors
    python -m emilie_min.toy.train caption            # text-to-image, for the methods that need it; begins from `edit`
    python -m emilie_min.toy.train export weights/toy-t2i.safetensors --config toy-t2i

With `torchrun --nproc_per_node 2 -m emilie_min.toy.train ...` each process takes its share of every batch; on two
cores, two processes of one thread each (OMP_NUM_THREADS=1) are faster than one of two. Each stage keeps its state in
`--runs` (default `runs/toy`), written atomically every few minutes; started again, it goes on from there.

The objective of `edit` is InstructPix2Pix's (Brooks et al. 2023, Eq. 1): predict the noise in the latent of the edited
picture, given the source's latent and the instruction, each dropped for 5% of the samples and both for another 5%. Two
departures make it affordable on two CPU cores, where a run sees some 10^5 samples: the loss is weighted by
1 / alpha_cumprod, bounded, because plain eps loss hardly feels an error in the clean latent at high noise; and high
noise, where the edit is decided, is drawn more often than low noise, where it only has to be kept.

The weights that ship took 2 hours on two shared cores (AVX-512 with bfloat16): 72,000 pictures in half an hour for the
autoencoder (`--bf16`, 4500 batches of 16), 305,000 edits in an hour and a half for the rest (`--bf16`, 2 processes of
16, 8719 batches without `--adds`, then 821 with `--adds 0.5 --ema 0.998 --lr 2.5e-3 --steps 10200`: edits that add had
chosen a free place at random until then). In float32 a step of the UNet took 11% longer. The text-to-image model took
another 75 minutes beside other work (`caption --bf16 --batch 16 --steps 7000`, 2 processes).
"""

import argparse
import copy
import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import reading
from ..checkpoint.writing import replacing
from ..config import load_config
from ..sampling import alphas_cumprod
from ..text import TextEncoder
from ..unet import UNetModel
from ..vae import AutoencoderKL
from . import world

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
FIRST_SEED = 10**9  # training scenes are seeded from here on; everything below is left to tests and evaluation


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 (64, 64, 3) pictures -> (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def edit_pair(seed: int, adds: float = 0.0) -> tuple[world.Scene, str, world.Scene]:
    """A scene some edits into a chain, an instruction, and the scene that it leads to.

    A share `adds` of the pairs add an object where two or three places are free: only those teach where "top left" is.
    """
    rng = random.Random(f"pair {seed}")
    if rng.random() < adds:
        scene = world.scene(seed)
        scene = replace(scene, objects=tuple(rng.sample(scene.objects, rng.choice((1, 2)))))
        text, after, _ = world.instruct(scene, seed, "add")
        return scene, text, after
    first, steps = world.chain(seed, 1 + seed % 4)
    return steps[-2][1] if len(steps) > 1 else first, steps[-1][0], steps[-1][1]


class EMA:
    """A running average of a module's weights, warmed up as the original's is."""

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay, self.updates = copy.deepcopy(module).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, new in zip(self.module.parameters(), module.parameters()):
            mean.lerp_(new, 1 - decay)


class Run:
    """One stage's state on disk: everything that a resumed run needs."""

    def __init__(self, path: Path, **parts):
        self.path, self.parts, self.step = path, parts, 0
        if path.exists():
            state = torch.load(path, weights_only=True, map_location="cpu")
            self.step = state.pop("step")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            print(f"{path}: going on from step {self.step}")
        torch.manual_seed(self.step * PROCESSES + RANK)

    def save(self) -> None:
        if RANK:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as f:
            torch.save({"step": self.step, **{name: part.state_dict() for name, part in self.parts.items()}}, f)


def average(tensors: list[Tensor]) -> None:
    """Replace tensors by their mean over the processes, in one exchange."""
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    for x, mean in zip(tensors, (flat / PROCESSES).split([x.numel() for x in tensors])):
        x.copy_(mean.view_as(x))


def loop(run: Run, model: nn.Module, ema: EMA, optimizer, steps: int, lr: float, update, every: float = 120.0) -> None:
    """Call `update(step)` -> loss until `steps`; warm the rate up, then cool it to a tenth by a cosine."""
    saved, smooth = time.time(), None
    bar = tqdm(range(run.step, steps), initial=run.step, total=steps, mininterval=10, disable=RANK > 0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in bar:
        rate = lr * min(1, (step + 1) / 300) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = update(step)
        optimizer.zero_grad()
        loss.backward()
        if PROCESSES > 1:
            average([p.grad for p in parameters])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
        run.step = ema.updates = step + 1
        ema.update(model)
        if time.time() - saved > every:
            run.save()
            saved = time.time()
    run.save()


def autocast(args):
    return torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=args.bf16)


def train_vae(args, config) -> None:
    """L1 on pixels, three times as much where an object is, and a weak KL term."""
    vae = AutoencoderKL(config.model.params.first_stage_config.params).to(
        args.device, memory_format=torch.channels_last
    )
    ema = EMA(vae, 0.999)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(args.runs / "vae.pt", vae=vae, ema=ema.module, optimizer=optimizer)

    def update(step: int) -> Tensor:
        first = FIRST_SEED + (step * PROCESSES + RANK) * args.batch
        seeds = range(first, first + args.batch)
        scenes = [edit_pair(seed)[2] for seed in seeds]
        x = to_tensor([world.pixels(s) for s in scenes]).to(args.device, memory_format=torch.channels_last)
        empty = to_tensor([world.background_pixels(s.background, s.style) for s in scenes]).to(args.device)
        weight = 1 + 2 * ((x - empty).abs().amax(1, keepdim=True) > 0.06).float()
        with autocast(args):
            mean, logvar = (y.float() for y in vae.moments(x))
            logvar = logvar.clamp(-30, 20)
            out = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return (weight * (out - x).abs()).mean() + 1e-4 * kl

    loop(run, vae, ema, optimizer, args.steps, args.lr, update)
    if RANK:
        return
    ema.module.eval()
    with torch.no_grad():
        scenes = [edit_pair(seed)[2] for seed in range(FIRST_SEED, FIRST_SEED + 256)]
        x = to_tensor([world.pixels(s) for s in scenes]).to(args.device)
        z = ema.module.encode(x)
        mse = ((ema.module.decode(z).clamp(-1, 1) - x) * 127.5).square().mean(dim=(1, 2, 3))
    print(f"scale_factor: {1 / z.std().item():.5f}  (channel stds {z.std(dim=(0, 2, 3)).tolist()})")
    print(f"PSNR: {(10 * torch.log10(255**2 / mse)).mean():.2f} dB")


class Editing(nn.Module):
    """UNet and text model together, since they train together."""

    def __init__(self, params):
        super().__init__()
        self.unet = UNetModel(params.unet_config.params)
        self.text = TextEncoder(params.cond_stage_config.params)


@torch.no_grad()
def pool(args, config, vae: nn.Module, text: TextEncoder, first: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`size` pairs as unscaled source latents, scaled target latents and token ids; for captions the sources are
    left empty, (size, 0, 16, 16)."""
    sources, targets, texts = [], [], []
    for start in range(first, first + size, 128):
        pairs = [edit_pair(seed, args.adds) for seed in range(start, min(start + 128, first + size))]
        pictures = [world.pixels(p[2]) for p in pairs]
        if args.stage == "edit":
            pictures += [world.pixels(p[0]) for p in pairs]
        with autocast(args):
            z = vae.encode(to_tensor(pictures).to(args.device, memory_format=torch.channels_last)).float()
        targets.append(z[: len(pairs)] * config.model.params.scale_factor)
        sources.append(z[len(pairs) :] if args.stage == "edit" else z[:, :0])
        texts += [p[1] if args.stage == "edit" else world.caption(p[2]) for p in pairs]
    return torch.cat(sources), torch.cat(targets), text.tokenize(texts).to(args.device)


def begin_from_edit(model: Editing, path: Path) -> None:
    """Take over the averaged weights of the `edit` stage: of its first layer, those that see the noisy latent."""
    weights = torch.load(path, weights_only=True, map_location="cpu")["ema"]
    first = "unet.input_blocks.0.0.weight"
    weights[first] = weights[first][:, : model.unet.in_channels]
    model.load_state_dict(weights)


def train_unet(args, config) -> None:
    """InstructPix2Pix's objective on pairs of the world, or latent diffusion's on captions of it; `args.reuse` draws
    of noise for each latent encoded."""
    params = config.model.params
    vae = AutoencoderKL(params.first_stage_config.params).to(args.device, memory_format=torch.channels_last)
    vae.load_state_dict(torch.load(args.runs / "vae.pt", weights_only=True, map_location="cpu")["ema"])
    vae.eval().requires_grad_(False)
    model = Editing(params).to(args.device)
    model.unet.to(memory_format=torch.channels_last)
    # the output starts at zero and so does every residual branch, as in the original
    zero = [model.unet.out[2]]
    for name, module in model.unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")):
            zero.append(module)
    for module in zero:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    if args.stage == "caption":
        begin_from_edit(model, args.runs / "edit.pt")
    ema = EMA(model, args.ema)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    run = Run(args.runs / f"{args.stage}.pt", model=model, ema=ema.module, optimizer=optimizer)
    cumprod = alphas_cumprod(params.linear_start, params.linear_end, params.timesteps).to(args.device)
    empty = model.text.tokenize([""]).to(args.device)
    per_pool = args.pool * args.reuse // args.batch
    now, order, data = -1, None, None

    def update(step: int) -> Tensor:
        nonlocal now, order, data
        if step // per_pool != now:
            now = step // per_pool
            data = pool(args, config, vae, model.text, FIRST_SEED + (now * PROCESSES + RANK) * args.pool, args.pool)
            generator = torch.Generator().manual_seed(now)
            order = torch.cat([torch.randperm(args.pool, generator=generator) for _ in range(args.reuse)])
        rows = order[step % per_pool * args.batch :][: args.batch]
        z_img, target, tokens = (x[rows] for x in data)
        b = len(rows)

        drop = torch.rand(b, device=args.device)  # text alone, image alone, both: 5% each
        tokens = torch.where((drop < 0.10)[:, None], empty, tokens)
        z_img = torch.where(((drop >= 0.05) & (drop < 0.15))[:, None, None, None], torch.zeros_like(z_img), z_img)

        u = torch.rand(b, device=args.device)
        t = ((1 - u**args.high_noise) * (len(cumprod) - 1)).round().long()
        a = cumprod[t].float()
        noise = torch.randn_like(target)
        z_t = a.sqrt()[:, None, None, None] * target + (1 - a).sqrt()[:, None, None, None] * noise
        x = torch.cat([z_t, z_img], 1).contiguous(memory_format=torch.channels_last)
        with autocast(args):
            eps = model.unet(x, t, model.text(tokens)).float()
        weight = (1 / a).clamp(max=args.bound)
        return (weight * F.mse_loss(eps, noise, reduction="none").mean((1, 2, 3))).mean()

    loop(run, model, ema, optimizer, args.steps, args.lr, update)


def export(args, config) -> None:
    """The three networks' averaged weights as one file in the original's key layout, float16."""
    vae = torch.load(args.runs / "vae.pt", weights_only=True, map_location="cpu")["ema"]
    stage = "edit" if config.model.params.unet_config.params.in_channels == 8 else "caption"
    edit = torch.load(args.runs / f"{stage}.pt", weights_only=True, map_location="cpu")
    prefixes = {
        "unet.": "model.diffusion_model.",
        "text.transformer.": "cond_stage_model.transformer.text_model.",
    }
    out = {"first_stage_model." + key: value for key, value in vae.items()}
    for key, value in edit["ema"].items():
        old = next(p for p in prefixes if key.startswith(p))
        out[prefixes[old] + key.removeprefix(old)] = value
    out = {key: value.to(torch.float16).contiguous() for key, value in out.items() if value.is_floating_point()}
    reading.write(out, args.out, {"family": "EMA", "config": args.config, "steps": str(edit["step"])})
    print(f"{args.out}: {len(out)} tensors, {args.out.stat().st_size / 1e6:.1f} MB, after {edit['step']} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("vae", "edit", "caption", "export"))
    parser.add_argument("out", nargs="?", type=Path, default=Path("weights/toy.safetensors"), help="for export")
    parser.add_argument("--config", choices=("toy", "toy-t2i"), help="default: toy-t2i for caption, else toy")
    parser.add_argument("--runs", type=Path, default=Path("runs/toy"), help="where states are kept")
    parser.add_argument("--steps", type=int, help="batches in all; default 4500 (vae), 9200 (edit), 8000 (caption)")
    parser.add_argument("--batch", type=int, help="of each process; default 16 (vae), 32 (edit)")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bf16", action="store_true", help="autocast to bfloat16: faster only where the machine has it"
    )
    parser.add_argument("--pool", type=int, default=4096, help="pairs encoded at a time (edit)")
    parser.add_argument("--reuse", type=int, default=4, help="draws of noise per encoded pair (edit)")
    parser.add_argument("--high-noise", type=float, default=1.5, help="1: uniform timesteps; more: higher ones (edit)")
    parser.add_argument("--bound", type=float, default=50.0, help="bound of the loss weight 1 / alpha_cumprod (edit)")
    parser.add_argument("--adds", type=float, default=0.2, help="share of pairs that practise places (edit)")
    parser.add_argument("--ema", type=float, default=0.9995, help="decay of the weight average (edit)")
    args = parser.parse_args()
    args.config = args.config or ("toy-t2i" if args.stage == "caption" else "toy")
    config = load_config(args.config)
    if PROCESSES > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    defaults = {"vae": (4500, 16, 1.5e-3), "edit": (9200, 32, 8e-4), "caption": (8000, 32, 8e-4)}.get(
        args.stage, (0, 0, 0.0)
    )
    args.steps, args.batch, args.lr = (given or d for given, d in zip((args.steps, args.batch, args.lr), defaults))
    torch.manual_seed(0)
    {"vae": train_vae, "edit": train_unet, "caption": train_unet, "export": export}[args.stage](args, config)


if __name__ == "__main__":
    main()
