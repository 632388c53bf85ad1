"""Marks the answers of exercises.ipynb: by numbers, and with a picture made by the answer beside the right one.

One function an exercise, which takes the answer. An answer that returns `...` is not answered yet. What is right is
computed by the package. The small model's two scales are 1, at which guidance is its first branch: pictures are made by
that branch alone.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from helpers import grid, marked, rms, seen
from PIL import Image
from torch import Tensor

import emilie_min as emilie
from emilie_min import sampling
from emilie_min.bench.metrics import psnr
from emilie_min.canvas import images
from emilie_min.emilie import Editor
from emilie_min.sampling import Gate
from emilie_min.toy import evaluate, world
from emilie_min.toy.judge import judge

SCENE, CROSS = 2000003, "make the cross yellow"
SIGNED = 2000070  # a scene whose latent's mean is nearly 0
TWINS = evaluate.FIRST + 6  # two red squares, of which a mask tells which is meant
STEPS, FEW, TURNS = 12, 6, 5  # of a whole edit, of one where fewer do, of a chain
OPEN = "not answered yet"
SPOTS = torch.tensor([[-2.0, 1.0], [2.0, 1.0], [0.0, -2.0]])


# ---- what every exercise needs


@cache
def editor() -> Editor:
    return emilie.load(device="cpu")


@cache
def levels() -> list[float]:
    """The noise levels of an edit of 12 steps."""
    return sampling.get_sigmas(STEPS, editor().alphas_cumprod).tolist()


def encoded(number: int) -> Tensor:
    """The image latent of a scene, unscaled, (1, 4, 16, 16)."""
    return images.to_latent(editor(), world.render(world.scene(number)))


def denoiser(z_img: Tensor, text: str) -> sampling.Denoise:
    """The branch that sees picture and instruction."""
    told = editor().context([text])
    return lambda x, sigma: editor().branches([x], sigma, [z_img], [told])[0]


def edit(z_img: Tensor, text: str, gate: Gate | None = None, steps: int = FEW, seed: int = 0) -> Tensor:
    """The package's own sampler: the scaled latent, (1, 4, 16, 16)."""
    sigmas, shape = sampling.get_sigmas(steps, editor().alphas_cumprod), tuple(z_img.shape)
    start = sampling.noise_stream(shape, seed, "init")() * sigmas[0]
    noise = sampling.noise_stream(shape, seed, "edit", 0)
    *_, last = sampling.sample_euler_ancestral(denoiser(z_img, text), start, sigmas, noise, gate)
    return last.x


@cache
def edited() -> Tensor:
    return edit(encoded(SCENE), CROSS, steps=STEPS)


def split(sigma: float, sigma_next: float) -> tuple[float, float]:
    """How the package's sampler splits a step, found from outside: sigma_down and sigma_up."""

    def one(x: float, noise: float) -> float:
        table, zero = torch.tensor([sigma, sigma_next, 0.0]), torch.zeros(1)
        sampler = sampling.sample_euler_ancestral(lambda *_: zero, zero + x, table, lambda *_: zero + noise)
        next(sampler)
        return next(sampler).x.item()

    return one(sigma, 0.0), one(0.0, 1.0)


def is_open(answer: object) -> bool:
    parts = answer if isinstance(answer, (tuple, list)) else [answer]
    return any(part is ... or part is None for part in parts)


def say(number: int, got: object, want: object, tolerance: float = 1e-4) -> bool | None:
    """Print the mark: right, wrong and by how much, or open. -> whether it is right, None while it is open."""
    mark, right = OPEN, None
    if not is_open(got):
        one, other = (torch.as_tensor(y, dtype=torch.float64) for y in (got, want))
        if one.shape != other.shape:
            right, mark = False, f"wrong: the shape is {tuple(one.shape)}, not {tuple(other.shape)}"
        else:
            apart = ((one - other).abs().max() / other.abs().max()).item()
            right = apart <= tolerance  # NaN is not
            mark = "right" if right else f"wrong: off by {apart:.0%} of the largest number, {got_and_want(one, other)}"
    print(f"exercise {number}: {mark}")
    return right


def got_and_want(one: Tensor, other: Tensor) -> str:
    at = (one - other).abs().flatten().nan_to_num(torch.inf).argmax()
    return f"{one.flatten()[at]:.4g} where {other.flatten()[at]:.4g} is right"


def show(right: list[Image.Image], names: list[str], yours: list[Image.Image] | None) -> None:
    """Pictures by the answer beside the right ones, or above them where there are several; grey while it is open."""
    yours = yours or [Image.new("RGB", right[0].size, "lightgrey")] * len(right)
    if len(right) == 1:
        grid([yours + right], [f"yours: {names[0]}", "right"], size=2.6)
    else:
        grid([yours, right], names, ["yours", "right"], size=2.2)


def blurred(width: float) -> Tensor:
    """400 points of the three spots."""
    return SPOTS[torch.arange(400) % 3] + width * torch.randn(400, 2, generator=torch.Generator().manual_seed(2))


def plane(right: Tensor, yours: Tensor | None, reach: float = 4.0) -> None:
    """Points (B, 2) by the answer beside the right ones."""
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.4), layout="constrained")
    for ax, points, name in zip(axes, (yours, right), ("yours", "right")):
        if points is not None:
            ax.plot(*points.clamp(-reach, reach).T, ".", color="crimson", ms=3)
        ax.set(title=name, xlim=(-reach - 0.2, reach + 0.2), ylim=(-reach - 0.2, reach + 0.2), aspect="equal")
    plt.show()


# ---- the exercises, in their order


def sigma_table(answer: Callable) -> None:
    """beta (T,) -> sigma (T,)."""
    diffusion = editor().config.diffusion
    root = torch.linspace(diffusion.linear_start**0.5, diffusion.linear_end**0.5, diffusion.timesteps)
    beta, want, z = root.double() ** 2, editor().log_sigmas.exp(), edited()
    got = answer(beta)
    noise, ts = sampling.noise_stream(tuple(z.shape), "table")(), (100, 400, 999)
    right = [seen(editor(), z + want[t].float() * noise, want[t].item()) for t in ts]
    yours = None
    if say(1, got, want, 1e-3) is not None and tuple(got.shape) == tuple(want.shape):
        yours = [seen(editor(), z + got[t].float() * noise, want[t].item()) for t in ts]
    show(right, [f"t = {t}" for t in ts], yours)


def stack(answer: Callable) -> None:
    """x (B, 4, h, w), sigma, z_img (B, 4, h, w) -> what the UNet is given, (B, 8, h, w)."""
    z_img, sigma = encoded(SCENE), levels()[3]
    x = edited() + sigma * sampling.noise_stream(tuple(z_img.shape), "stack")()
    told, given = editor().context([CROSS]), []
    handle = editor().unet.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    (denoised,) = editor().branches([x], sigma, [z_img], [told])
    handle.remove()
    want, t, context = given[0]
    got, yours = answer(x, sigma, z_img), None
    if say(2, got, want) is not None and got.shape == want.shape:
        yours = [seen(editor(), x - sigma * editor().unet(got, t, context))]
    show([seen(editor(), denoised)], ["denoised"], yours)


def guide(answer: Callable) -> None:
    """cond, img_cond, uncond (B, 4, h, w), text_scale, image_scale -> (B, 4, h, w)."""
    z_img, sigma, told = encoded(SCENE), levels()[3], editor().context([CROSS, ""])
    x = edited() + sigma * sampling.noise_stream(tuple(z_img.shape), "guide")()
    nothing = torch.zeros_like(z_img)
    three = editor().branches([x] * 3, sigma, [z_img, z_img, nothing], [told[:1], told[1:], told[1:]])
    scales = ((1, 1), (0, 1), (0, 0), (1.5, 1))
    got, want = ([f(*three, *s) for s in scales] for f in (answer, sampling.guide))
    right = say(3, ... if is_open(got) else torch.stack(got), torch.stack(want))
    names = [f"$s_T$ = {s_t}, $s_I$ = {s_i}" for s_t, s_i in scales]
    yours = None if right is None else [seen(editor(), z) for z in got]
    show([seen(editor(), z) for z in want], names, yours)


def ancestral_split(answer: Callable) -> None:
    """sigma, sigma_next -> sigma_down, sigma_up."""
    pairs = list(zip(levels(), levels()[1:-1]))
    got, want = ([f(*pair) for pair in pairs] for f in (answer, split))
    right = say(4, ... if any(map(is_open, got)) else got, want, 1e-3)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for ax, k, name in zip(axes, (0, 1), ("sigma_down", "sigma_up")):
        ax.semilogy([pair[k] for pair in want], "o", color="0.6", ms=10, label="right")
        if right is not None:
            ax.semilogy([max(float(pair[k]), 1e-4) for pair in got], "-", color="crimson", label="yours")
        ax.set(title=name, xlabel="step")
        ax.legend()
    plt.show()


def step(answer: Callable) -> None:
    """x, eps, sigma, sigma_down, sigma_up, noise -> x of the next level."""
    x, eps, noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    sigma, sigma_next = levels()[3:5]
    table = torch.tensor([sigma, sigma_next, 0.0])
    sampler = sampling.sample_euler_ancestral(lambda *_: x - sigma * eps, x, table, lambda *_: noise)
    next(sampler)
    right = say(5, answer(x, eps, sigma, *split(sigma, sigma_next), noise), next(sampler).x)
    generator, width = torch.Generator().manual_seed(1), 0.5
    x = levels()[0] * torch.randn(400, 2, generator=generator)
    for sigma, sigma_next in pairwise(levels() if right is not None else []):
        share = width**2 / (width**2 + sigma**2)
        near = torch.softmax(-(x[:, None] - SPOTS).square().sum(-1) / (2 * (width**2 + sigma**2)), dim=1)
        centre = near @ SPOTS  # of the blurred spots; the mean of what x may have been lies between it and x
        eps = (x - (centre + share * (x - centre))) / sigma
        fresh = torch.randn(400, 2, generator=generator)
        down, up = split(sigma, sigma_next) if sigma_next > 0 else (0.0, 0.0)
        x = answer(x, eps, sigma, down, up, fresh).nan_to_num(1e6).clamp(-1e6, 1e6)
    plane(blurred(width), None if right is None else x)


def langevin(answer: Callable) -> None:
    """z (B, 2), gradient of the energy there, lambda, unit noise -> the next z."""
    width = 0.4

    def gradient(z: Tensor) -> Tensor:
        apart = z[:, None] - SPOTS
        near = torch.softmax(-apart.square().sum(-1) / (2 * width**2), dim=1)
        return (near[..., None] * apart).sum(1) / width**2

    z, g, noise = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    want = z - 0.02 * g + 0.2 * noise  # lambda = 0.04
    right = say(6, answer(z, g, 0.04, noise), want)
    generator = torch.Generator().manual_seed(1)
    z = 2 * torch.randn(400, 2, generator=generator)
    for _ in range(300 if right is not None else 0):
        z = answer(z, gradient(z), 0.04, torch.randn(400, 2, generator=generator)).nan_to_num(1e6).clamp(-1e6, 1e6)
    plane(blurred(width), None if right is None else z)


def eq8(answer: Callable) -> None:
    """eps (B, 4, h, w), mask (1, 1, h, w) -> the gated eps."""
    place = world.mask("top right")
    cells = images.latent_mask(place, editor().vae.factor)
    eps = sampling.noise_stream((1, 4, *cells.shape[-2:]), "eps")()
    yours = None
    if say(7, answer(eps, cells), sampling.eq8(cells)(eps, eps, 1.0)) is not None:
        yours = [marked(seen(editor(), edit(encoded(SCENE), CROSS, lambda eps, x, sigma: answer(eps, cells))), place)]
    show([marked(seen(editor(), edit(encoded(SCENE), CROSS, sampling.eq8(cells))), place)], ["the edit"], yours)


def factor(answer: Callable) -> None:
    """again = E(D(z)), z, both (1, 4, h, w) -> f."""
    z = editor().scale_factor * encoded(SIGNED)
    right = say(8, answer(again(z), z), again(z).abs().mean() / z.abs().mean(), 1e-3)
    yours = None if right is None else rescaled(answer)
    names = ["an edit", f"turn {TURNS}, asked for nothing"]
    show(rightly_rescaled(), names, yours)


def again(z: Tensor) -> Tensor:
    return editor().encode(editor().decode(z))


def rescaled(f: Callable) -> list[Image.Image]:
    """An edit that starts from f times a scaled latent, and a chain in which each does."""
    z = editor().scale_factor * encoded(SIGNED)
    text, _, _ = world.instruct(world.scene(SIGNED), SIGNED, "recolour")
    pictures = [seen(editor(), edit(float(f(again(z), z)) * z, text))]
    z = editor().scale_factor * encoded(SCENE)
    for turn in range(TURNS):
        z = edit(float(f(again(z), z)) * z, "", steps=3, seed=turn)
    return [*pictures, seen(editor(), z)]


@cache
def rightly_rescaled() -> list[Image.Image]:
    return rescaled(lambda again, z: emilie.emilie.rescale_factor(editor(), z))


def iterate(answer: Callable) -> None:
    """editor, z, way ("latent" or "image") -> z_img of the next edit, unscaled."""
    z, ways = edited(), ("latent", "image")
    got = [answer(editor(), z, way) for way in ways]
    right = say(9, ... if is_open(got) else torch.cat(got), torch.cat([z / editor().scale_factor, again(z)]), 1e-3)
    yours, truth = None if right is None else drift(answer), right_drift()
    ends = [row[-1] for row in truth]
    show(ends, [f"{way}, turn {TURNS}" for way in ways], yours and [row[-1] for row in yours])
    first, turns = world.render(world.scene(SCENE)), range(1, TURNS + 1)
    fig, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for k, way in enumerate(ways):
        ax.plot(turns, [psnr(image, first) for image in truth[k]], "o", color=f"C{k}", label=f"{way}, right")
        if yours:
            ax.plot(turns, [psnr(image, first) for image in yours[k]], color=f"C{k}", label=f"{way}, yours")
    ax.set(xlabel="turn", ylabel="PSNR to the first picture, dB", xticks=turns)
    ax.legend()
    plt.show()


def drift(answer: Callable) -> list[list[Image.Image]]:
    """Asked for nothing, turn after turn, both ways: the pictures."""
    rows = []
    for way in ("latent", "image"):
        z_img, row = encoded(SCENE), []
        for turn in range(TURNS):
            z = edit(z_img, "", steps=3, seed=turn)
            z_img = answer(editor(), z, way)
            row.append(seen(editor(), z))
        rows.append(row)
    return rows


@cache
def right_drift() -> list[list[Image.Image]]:
    return drift(lambda editor, z, way: z / editor.scale_factor if way == "latent" else again(z))


def own_gate(answer: Callable) -> None:
    """mask (1, 1, h, w), source (1, 4, h, w), scaled -> (eps, x, sigma) -> eps. Marked by what it does to an edit."""
    start = world.twins(TWINS)
    text, after, place = world.instruct(start, TWINS, "recolour")
    z_img = images.to_latent(editor(), world.render(start))
    cells = images.latent_mask(place, editor().vae.factor)
    source = editor().scale_factor * z_img
    gate, yours = answer(cells, source), None
    if is_open(gate) or is_open(gate(source, source, 1.0)):
        print(f"exercise 10: {OPEN}")
    else:
        z = edit(z_img, text, gate, seed=6)
        far, verdict = rms((z - source)[(cells == 0).expand_as(z)]), judge(seen(editor(), z), after)
        mark = "right" if far <= 0.1 and verdict.correct else "wrong"
        why = "as it should be" if verdict.correct else verdict.why
        print(f"exercise 10: {mark}: outside {far:.3f} from the source, where 0.1 is allowed; the picture is {why}")
        yours = [marked(seen(editor(), z), place)]
    show([marked(world.render(after), place)], [text], yours)
