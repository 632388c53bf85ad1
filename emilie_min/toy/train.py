"""Train the small models that ship.

    python -m emilie_min.toy.train weights/toy.safetensors                                     # from nothing
    python -m emilie_min.toy.train weights/toy.safetensors --weights weights/toy.safetensors   # going on from weights
    python -m emilie_min.toy.train weights/toy-t2i.safetensors --config toy-t2i --weights weights/toy.safetensors

The third makes the text-to-image sister, for the methods that need one, from an editing model: captions instead of
instructions, the same autoencoder. Each trains for `--minutes`, on a GPU where there is one, while other processes draw
the pictures. The state is kept in `--runs`; the same command, given again, goes on from there.

From nothing, a quarter of the time goes to the autoencoder. The rest trains UNet and text model with InstructPix2Pix's
objective (Brooks et al. 2023, Eq. 1): predict the noise in the latent of the edited picture, given the source's latent
and the instruction, each dropped for 5% of the samples and both for another 5%. What differs here:

- Where the text alone is dropped, the target is the source. The branch of guidance that sees only the picture then says
  "this picture", and y = "" keeps it (`--null-target edited`: the objective of the paper).
- Some scenes have two objects of one shape (`--twins`); where they are equal, either may be the one that changes, and
  only a mask can tell. Some edits practise places (`--places`): only those teach where "top left" is.
- The loss is weighted by 1 / alpha_cumprod, bounded: a plain loss on eps hardly feels an error in the clean latent at
  high noise. And high noise, where the edit is decided, is drawn more often than low noise, where it is only kept.
"""

import argparse
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from ..checkpoint.writing import atomic_write
from ..emilie import Editor
from ..errors import CheckpointError, EmilieError
from ..loading import load
from . import world

FIRST_SEED = 10**9  # training scenes are seeded from here on; everything below is left to tests and evaluation
WARM_UP, FLOOR = 200, 0.02  # batches until the full learning rate, and the share of it that is left at the end
DECAY = 0.999  # of the average of weights
HIGH_NOISE, BOUND = 1.5, 50.0  # 1 draws all timesteps alike, more the higher ones more often; the loss weight's bound
PREFILL = 32  # chunks of new pairs that are in the buffer before training starts
DEFAULTS = {
    "cuda": {"minutes": 5.0, "batch": 1024, "lr": 1.2e-3, "buffer": 2**18, "bf16": True},
    "cpu": {"minutes": 120.0, "batch": 32, "lr": 8e-4, "buffer": 2**14, "bf16": False},
}

# ---- pairs, drawn in other processes


def edit_pair(seed: int, twins: float = 0.15, places: float = 0.35) -> tuple[world.Scene, str, world.Scene]:
    """A scene, an instruction, and the scene that it leads to.

    In a share `twins` of the pairs two objects have one shape, and one colour too in 6 of 10 of these; a share `places`
    of the others add an object where two or three places are free; the rest are some edits into a chain.
    """
    rng = random.Random(f"pair {seed}")
    if rng.random() < twins:
        scene = world.twins(seed, alike=rng.random() < 0.6)
        text, after, _ = world.instruct(scene, seed, rng.choice(("recolour", "recolour", "shape", "remove")))
        return scene, text, after
    if rng.random() < places:
        scene = world.scene(seed)
        scene = replace(scene, objects=tuple(rng.sample(scene.objects, rng.choice((1, 2)))))
        text, after, _ = world.instruct(scene, seed, "add")
        return scene, text, after
    first, steps = world.chain(seed, 1 + seed % 4)
    return steps[-2][1] if len(steps) > 1 else first, steps[-1][0], steps[-1][1]


def draw(scenes: Iterable[world.Scene]) -> np.ndarray:
    """uint8 (B, 64, 64, 3)"""
    return np.stack([world.pixels(scene) for scene in scenes])


def draw_edits(pairs: list) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Pictures before and after, and instructions."""
    before, texts, after = zip(*pairs)
    return draw(before), draw(after), texts


def draw_captioned(pairs: list) -> tuple[np.ndarray, list[str]]:
    """Pictures and captions."""
    return draw(after for _, _, after in pairs), [world.caption(after) for _, _, after in pairs]


def draw_bare(pairs: list) -> tuple[np.ndarray, np.ndarray]:
    """Pictures with their objects and without."""
    return draw(after for _, _, after in pairs), draw(replace(after, objects=()) for _, _, after in pairs)


class Chunks(Dataset):
    """Chunk i is pairs i * size to (i + 1) * size - 1, as `drawn` gives them."""

    def __init__(self, drawn: Callable[[list], tuple], size: int, twins: float, places: float):
        self.drawn, self.size, self.twins, self.places = drawn, size, twins, places

    def __getitem__(self, i: int) -> tuple:
        first = FIRST_SEED + i * self.size
        return self.drawn([edit_pair(seed, self.twins, self.places) for seed in range(first, first + self.size)])


def feed(chunks: Chunks, first: int, workers: int) -> Iterator[tuple]:
    """Chunk `first` and all after it, in order, drawn ahead by `workers` processes."""
    # collated by `tuple`, arrays stay NumPy's and come through pipes: shared memory is scarce in some containers
    return iter(
        DataLoader(
            chunks,
            batch_size=None,
            sampler=range(first, 2**40),
            num_workers=workers,
            collate_fn=tuple,
            worker_init_fn=end_with_parent,
        )
    )


def end_with_parent(_: int) -> None:
    """Let a worker end when the trainer is gone, were it killed: it would wait at its full pipe for ever."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def to_tensor(pictures: np.ndarray, device: torch.device | str) -> Tensor:
    """uint8 (B, 64, 64, 3) -> (B, 3, 64, 64) in [-1, 1], channels last."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- the loop of both stages


def fit(
    model: nn.Module,
    path: Path,
    batches: Callable[[int], Iterator[tuple]],
    loss: Callable[..., Tensor],
    minutes: float,
    lr: float,
    weight_decay: float = 0.0,
    save_every: float = 60.0,
    **begun,
) -> tuple[nn.Module, int]:
    """Train until `minutes` have gone by, those before a kill included; the average of weights and the steps taken.

    batches: from a step to the batches from there on; loss: of one batch; path: the state, written whole or not at all
    every `save_every` seconds; begun: what a run that goes on from `path` must have begun with.
    Raises CheckpointError for another run's state, EmilieError where the loss is not finite.
    """
    step, seconds = 0, 0.0
    average = AveragedModel(
        model,
        multi_avg_fn=lambda mean, new, _: torch._foreach_lerp_(mean, new, 1 - min(DECAY, (1 + step) / (10 + step))),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)

    def rate(step: int) -> float:
        done = min(1.0, seconds / max(1e-9, 60 * minutes))
        return min(1.0, (step + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))

    schedule = LambdaLR(optimizer, rate)
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        if (other := state.get("begun")) != begun:
            raise CheckpointError(f"{path} is of a run begun with {other}, not {begun}: choose another --runs")
        step, seconds = state["step"], state["seconds"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        print(f"{path}: going on from step {step}", flush=True)
    torch.manual_seed(step)

    def save() -> None:
        states = {name: part.state_dict() for name, part in parts.items()}
        with atomic_write(path) as f:
            torch.save({"begun": begun, "step": step, "seconds": seconds, **states}, f)

    def report() -> None:
        nonlocal total, counted
        if not math.isfinite(mean := float(total) / counted):
            raise EmilieError(f"{path.stem}: the loss is {mean} by step {step}: lower --lr; {path} is from before")
        print(f"{path.stem}: {seconds / 60:.1f} of {minutes:g} min, step {step}, loss {mean:.4f}", flush=True)
        total, counted = 0.0, 0

    total, counted = 0.0, 0  # the loss since the last report, left on the GPU until then
    model.train()
    clock = saved = time.monotonic()
    feed = batches(step)
    while seconds < 60 * minutes:
        value = loss(*next(feed))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        total, counted, step = total + value.detach(), counted + 1, step + 1
        now = time.monotonic()
        seconds, clock = seconds + now - clock, now
        schedule.step()
        if now - saved > save_every:
            report()
            save()
            saved = now
    if counted:
        report()
        save()
    return average.module.eval().requires_grad_(False), step


# ---- the autoencoder


def reconstruction(vae: nn.Module, x: Tensor, bare: Tensor, autocast: AbstractContextManager) -> Tensor:
    """L1 on pixels, three times as much where an object is, and a weak KL term. x, bare: (B, 3, 64, 64)."""
    weight = 1 + 2 * ((x - bare).abs().amax(1, keepdim=True) > 0.06).float()
    with autocast:
        mean, logvar = (y.float() for y in vae.moments(x))
        logvar = logvar.clamp(-30, 20)
        out = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (weight * (out - x).abs()).mean() + 1e-4 * kl


@torch.no_grad()
def scale_latents(vae: nn.Module, x: Tensor, std: float) -> None:
    """Scale the latents so that those of x, (B, 3, 64, 64), have this standard deviation; they decode as before."""
    k, channels = std / vae.encode(x).std().item(), vae.post_quant_conv.in_channels
    vae.quant_conv.weight[:channels] *= k  # the means
    vae.quant_conv.bias[:channels] *= k
    vae.quant_conv.bias[channels:] += 2 * math.log(k)  # the logarithms of the variances
    vae.post_quant_conv.weight /= k


# ---- UNet and text model


class Buffer:
    """The last `size` rows of some tensors of equal length; each addition takes the place of the oldest."""

    def __init__(self, size: int):
        self.size, self.added, self.columns = size, 0, None

    def add(self, *columns: Tensor) -> None:
        if self.columns is None:
            self.columns = [x.new_empty(self.size, *x.shape[1:]) for x in columns]
        rows = torch.arange(self.added, self.added + len(columns[0]), device=columns[0].device) % self.size
        for mine, new in zip(self.columns, columns):
            mine[rows] = new
        self.added += len(rows)

    def sample(self, n: int) -> tuple[Tensor, ...]:
        rows = torch.randint(min(self.added, self.size), (n,), device=self.columns[0].device)
        return tuple(x[rows] for x in self.columns)


def drop(
    z_img: Tensor, target: Tensor, tokens: Tensor, empty: Tensor, source: Tensor | None = None, u: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch in which 5% have lost the text, 5% text and picture, 5% the picture: z_img, target, tokens.

    z_img: (B, 4, 16, 16) unscaled, no channels for captions; target, source: (B, 4, 16, 16) scaled; tokens: (B, 77);
    empty: (1, 77), those of ""; source: what becomes the target where the text alone is lost; u: (B,) in [0, 1), which
    row loses what.
    """
    u = torch.rand(len(target), device=target.device) if u is None else u
    u = u[:, None, None, None]
    if source is not None:
        target = torch.where(u < 0.05, source, target)
    tokens = torch.where(u[:, 0, 0] < 0.10, empty, tokens)
    return torch.where((u >= 0.05) & (u < 0.15), torch.zeros_like(z_img), z_img), target, tokens


def denoising(
    model: nn.Module, z_img: Tensor, target: Tensor, tokens: Tensor, cumprod: Tensor, autocast: AbstractContextManager
) -> Tensor:
    """The weighted error of the noise predicted in a noised target; model: "unet" and "text"; cumprod: (T,)."""
    u = torch.rand(len(target), device=target.device)
    t = ((1 - u**HIGH_NOISE) * (len(cumprod) - 1)).round().long()
    a, noise = cumprod[t].float(), torch.randn_like(target)
    z_t = a.sqrt()[:, None, None, None] * target + (1 - a).sqrt()[:, None, None, None] * noise
    x = torch.cat([z_t, z_img], 1).contiguous(memory_format=torch.channels_last)
    with autocast:
        eps = model["unet"](x, t, model["text"](tokens)).float()
    return ((1 / a).clamp(max=BOUND) * F.mse_loss(eps, noise, reduction="none").mean((1, 2, 3))).mean()


def zero_last_layers(unet: nn.Module) -> None:
    """As in the original, the output starts at zero and every residual branch too."""
    for name, module in unet.named_modules():
        if name == "out.2" or name.endswith(("out_layers.3", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def take_over(editor: Editor, other: Editor) -> None:
    """Another model's weights; of its UNet's first layer only what sees the noisy latent, if this one sees no more.

    Raises CheckpointError where they do not fit.
    """
    first, weights = "input_blocks.0.0.weight", other.unet.state_dict()
    weights[first] = weights[first][:, : editor.unet.in_channels]
    try:
        editor.unet.load_state_dict(weights)
        editor.text.load_state_dict(other.text.state_dict())
        editor.vae.load_state_dict(other.vae.state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {other.model} do not fit: begin from a small editing model's") from error


# ---- the two stages


def train_autoencoder(args: argparse.Namespace, editor: Editor, minutes: float) -> nn.Module:
    """An autoencoder whose latents have the variance that the config's scale_factor says."""
    vae, size = editor.vae.requires_grad_(True), max(1, min(args.batch // 2, 128))

    def batches(step: int) -> Iterator[tuple]:
        for pictures in feed(Chunks(draw_bare, size, args.twins, args.places), step, args.workers):
            yield tuple(to_tensor(x, editor.device) for x in pictures)

    loss = partial(reconstruction, vae, autocast=autocast(args))
    vae, _ = fit(vae, args.runs / "vae.pt", batches, loss, minutes, 1.5e-3, **saving(args))
    some, _ = Chunks(draw_bare, 256, args.twins, args.places)[0]
    scale_latents(vae, to_tensor(some, editor.device), 1 / editor.scale_factor)
    return vae


def train_unet(args: argparse.Namespace, editor: Editor, vae: nn.Module, minutes: float) -> tuple[nn.Module, int]:
    """UNet and text model, on edits or, where the UNet has no room for a picture, on captions; and the steps taken."""
    model = nn.ModuleDict({"unet": editor.unet, "text": editor.text}).requires_grad_(True)
    cumprod, empty = editor.alphas_cumprod.to(editor.device), editor.text.tokenize([""]).to(editor.device)
    editing = editor.unet.in_channels == 2 * vae.post_quant_conv.in_channels
    new = max(1, args.batch // args.reuse)  # pairs in each step
    chunks = Chunks(draw_edits if editing else draw_captioned, new, args.twins, args.places)

    @torch.no_grad()
    def encode(pictures: np.ndarray) -> Tensor:
        with autocast(args):
            return vae.encode(to_tensor(pictures, editor.device)).float()

    def batches(step: int) -> Iterator[tuple]:
        buffer = Buffer(args.buffer)
        for i, (*pictures, texts) in enumerate(feed(chunks, step, args.workers)):
            *source, target = (encode(x) for x in pictures)
            z_img = source[0] if editing else target[:, :0]
            buffer.add(z_img, target * editor.scale_factor, editor.text.tokenize(texts).to(editor.device))
            if i >= PREFILL:
                yield buffer.sample(args.batch)

    def loss(z_img: Tensor, target: Tensor, tokens: Tensor) -> Tensor:
        source = z_img * editor.scale_factor if editing and args.null_target == "source" else None
        return denoising(model, *drop(z_img, target, tokens, empty, source), cumprod, autocast(args))

    return fit(model, args.runs / "unet.pt", batches, loss, minutes, args.lr, weight_decay=0.01, **saving(args))


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.partition(":")[0], torch.bfloat16, enabled=args.bf16)


def saving(args: argparse.Namespace) -> dict:
    """How often `fit` saves its state, and what a run must have begun with to go on from it."""
    return {"save_every": args.save_every, "config": args.config, "weights": str(args.weights or "none")}


def train(args: argparse.Namespace) -> None:
    """From the command line's arguments to a weight file."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    editor, minutes = load("random", args.config, args.device, "float32"), args.minutes
    for network in (editor.unet, editor.vae):
        network.to(memory_format=torch.channels_last)
    vae = editor.vae
    if args.weights:
        take_over(editor, load(args.weights, device=args.device, dtype="float32"))
    else:
        zero_last_layers(editor.unet)
        begun = (args.runs / "unet.pt").exists()  # a UNet has learnt its latents: the autoencoder stays as it is
        vae = train_autoencoder(args, editor, 0.0 if begun else minutes / 4)
        minutes *= 3 / 4
    average, steps = train_unet(args, editor, vae, minutes)
    export({"vae": vae, "unet": average["unet"], "text": average["text"]}, args.out, args.config, steps)


def export(networks: dict[str, nn.Module], out: Path, config: str, steps: int) -> None:
    """One file in the original's key layout, float16, written whole or not at all."""
    prefixes = {"vae.": "first_stage_model.", "unet.": "model.diffusion_model."}
    prefixes["text.transformer."] = "cond_stage_model.transformer.text_model."
    tensors = {}
    for key, value in nn.ModuleDict(networks).state_dict().items():
        ours = next(prefix for prefix in prefixes if key.startswith(prefix))
        if value.is_floating_point():
            tensors[prefixes[ours] + key.removeprefix(ours)] = value.cpu().to(torch.float16).contiguous()
    with atomic_write(out) as f:
        f.write(save(tensors, {"family": "EMA", "config": config, "steps": str(steps)}))
    print(f"{out}: {len(tensors)} tensors, {out.stat().st_size / 1e6:.1f} MB, after {steps} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the weights to write, .safetensors")
    parser.add_argument("--config", choices=("toy", "toy-t2i"), default="toy", help="toy-t2i: captions, not edits")
    parser.add_argument("--weights", type=Path, help="go on from these, and keep their autoencoder")
    parser.add_argument("--runs", type=Path, help="the folder of the state; default: runs/NAME for NAME.safetensors")
    parser.add_argument("--minutes", type=float, help="in all, those before a kill included; 5 on a GPU, 120 on a CPU")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between saves of the state")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--batch", type=int, help="default: 1024 on a GPU, 32 on a CPU")
    parser.add_argument("--lr", type=float, help="peak rate for UNet and text model; 1.2e-3 on a GPU, 8e-4 on a CPU")
    parser.add_argument("--reuse", type=int, default=4, help="how often a pair is seen, each time with other noise")
    parser.add_argument("--buffer", type=int, help="pairs kept as latents; default: 262144 on a GPU, 16384 on a CPU")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="that draw pictures")
    parser.add_argument("--twins", type=float, default=0.15, help="share of pairs in which two objects have one shape")
    parser.add_argument("--places", type=float, default=0.35, help="share of the others that practise places")
    parser.add_argument("--null-target", choices=("source", "edited"), default="source", help='what y = "" stands for')
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in DEFAULTS["cuda" if args.device.startswith("cuda") else "cpu"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.runs = args.runs or Path("runs") / args.out.stem
    if args.out.suffix != ".safetensors":
        parser.error(f"{args.out}: the weights are written as a .safetensors file")
    if not (0 <= args.twins <= 1 and 0 <= args.places <= 1):
        parser.error("--twins and --places are shares: from 0 to 1")
    if not (min(args.batch, args.reuse, args.workers) >= 1 and args.batch <= args.buffer and args.minutes >= 0):
        parser.error(
            "--batch, --reuse and --workers must be at least 1, --buffer at least --batch, --minutes at least 0"
        )
    try:
        train(args)
    except (EmilieError, OSError) as error:
        parser.exit(2, f"train: {error}\n")


if __name__ == "__main__":
    main()
