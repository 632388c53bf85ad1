"""`emilie check`: whether this machine with these weights is all right, for somebody who does not read the code.

Each check gives a `Finding`: green, yellow or red, what was found and expected, and what to do. What a range rests on
is said beside it, and in what is printed: for the small model "measured" on it; for the released weights, which were
not at hand, "published", or "by theory", what follows from what is computed. The weights are loaded as for an edit.
"""

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from .. import __version__, loading
from ..attention import attention
from ..canvas import images
from ..canvas.canvas import check_can_edit
from ..canvas.canvas import open as open_canvas
from ..canvas.photo import changed
from ..checkpoint import reading
from ..checkpoint.convert import digests
from ..checkpoint.download import RELEASED, hash_file
from ..checkpoint.ready import available_memory
from ..emilie import Editor
from ..errors import EmilieError, first_line, printable
from ..sampling import noise_stream
from ..speed.measure import LIMITS, forget_peak, peak_rss
from ..toy import world
from ..toy.judge import judge
from .options import find_released, load_editor, small_world

GREEN, YELLOW, RED = "green", "yellow", "red"
INKS = {GREEN: 32, YELLOW: 33, RED: 31}
RESTS = {"toy": "measured", "ip2p": "by theory"}  # what the ranges rest on, where nothing else is said
# Through the autoencoder and back, in dB. Random weights have 7 to 11; the small model 34.3 on this very picture,
# measured; the released kind has 23.4 +- 3.8 on photos, published in Stability's card of it, and this picture is
# plainer than photos.
BACK = {"toy": 32.0, "ip2p": 20.0}
SPREAD = 0.3, 3.0  # of a scaled latent, which the factor 0.18215 was chosen to give 1 on average (Rombach et al. 2022)
# The cosine of predicted and added noise, by noise level sigma. Random weights have 0 at all. The small model's were
# measured: 0.983 at the lowest, 0.997 and more above. For the released weights the range is by theory: an error r of
# the denoised latent, whose spread is 1, gives sigma / sqrt(sigma^2 + r^2). Who knows nothing and says 0 has r = 1;
# who sees the picture must have r <= 0.2 + 0.6 sigma where that is less.
NOISE = {
    "toy": {0.1: 0.95, 0.3: 0.99, 1.0: 0.998, 3.0: 0.9995, 8.0: 0.9998, 14.0: 0.9998},
    "ip2p": {s: round(s / math.hypot(s, min(1, 0.2 + 0.6 * s)) - 0.001, 3) for s in (0.1, 0.3, 1.0, 3.0, 8.0, 14.0)},
}
EFFECT = 1e-3  # of a network's output: what another text or picture must change at least; half precision rounds by that
STEPS = 4  # of the short edits, but for the small model
SENTENCES = {  # ids of known sentences, between the start and end token: of CLIP's published vocabulary, of our words
    "ip2p": {
        "make it winter": [1078, 585, 2541],
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "photorealistic!": [1153, 16157, 256],  # of two parts and a mark
    },
    "toy": {"make it night": [17, 15, 18], "add a red star": [1, 0, 22, 28]},
}
PARTS = {"unet": "the UNet", "vae": "the autoencoder", "text": "the text model"}
LONG = 60.0  # seconds of an edit from which on it is told how to be faster


class Finding(NamedTuple):
    """What a check found."""

    status: str
    found: str
    remedy: str = ""


@dataclass
class Subject:
    """What is checked, and a picture to check it on."""

    editor: Editor
    path: Path  # the weights
    side: int  # px, of the picture

    def __post_init__(self) -> None:
        scene = world.render(world.scene(3))
        self.picture = (
            scene if self.side == world.SIZE else scene.resize((self.side, self.side), Image.Resampling.BICUBIC)
        )
        factor = self.editor.vae.factor
        self.noise = noise_stream((1, 4, self.side // factor, self.side // factor), 0, "check")()
        self.kind = "toy" if small_world(self.editor) else "ip2p"
        self.text = "make it night"

    def z_img(self) -> Tensor:
        return images.to_latent(self.editor, self.picture)


def run(args: argparse.Namespace) -> int:
    """Print each finding as it is found, or all as JSON; 1 where one is red, else 0."""
    started, results = time.time(), []
    for name, finding, seconds in findings(args, quiet=args.json):
        results.append({"check": name, **finding._asdict(), "seconds": round(seconds, 2)})
        if not args.json:
            print(told(name, finding, sys.stdout.isatty()), flush=True)
    status = next((s for s in (RED, YELLOW) if any(r["status"] == s for r in results)), GREEN)
    if args.json:
        print(json.dumps({"status": status, "version": __version__, "checks": results}, indent=1))
    else:
        ends = {GREEN: "all is well", YELLOW: "usable; see what is yellow", RED: "not to be trusted; see what is red"}
        print(f"{status}: {ends[status]} ({time.time() - started:.0f} s)")
    return int(status == RED)


def told(name: str, finding: Finding, ink: bool = False) -> str:
    status = f"{finding.status:<6}"
    status = f"\x1b[{INKS[finding.status]}m{status}\x1b[0m" if ink else status
    remedy = f"\n{'':27}-> {finding.remedy}" if finding.remedy else ""
    return f"{status}  {name:<17}  {finding.found}{remedy}"


def findings(args: argparse.Namespace, quiet: bool = False) -> Iterator[tuple[str, Finding, float]]:
    """(what, finding, seconds) of each check; those that need weights are left out where none load."""
    started = time.time()
    finding = attempt(lambda: kernel(args.device, args.dtype))
    yield "one kernel", finding, time.time() - started
    if finding.status == RED:
        return
    started, loaded = time.time(), []
    forget_peak()

    def load() -> Finding:
        found = find_released() if args.weights is None and args.config is None else None
        path = Path(args.weights or found or loading.shipped("toy.safetensors"))
        if quiet:  # the line that an edit begins with
            sys.stdout, stdout = sys.stderr, sys.stdout
        try:
            editor = load_editor(args)
        finally:
            if quiet:
                sys.stdout = stdout
        check_can_edit(editor)
        full = editor.config.sampling.resolution
        loaded.append(Subject(editor, path, full if editor.device.type == "cuda" else min(full, 256)))
        return which(loaded[0])

    yield "weights", attempt(load), time.time() - started
    for name, check in CHECKS.items() if loaded else ():
        started = time.time()
        yield name, attempt(lambda check=check: check(loaded[0])), time.time() - started


def attempt(check: Callable[[], Finding]) -> Finding:
    """A check's finding; whatever goes wrong in it is one."""
    try:
        with torch.no_grad():
            return check()
    except EmilieError as error:
        return Finding(RED, printable(error))
    except Exception as error:  # a check must not end the others
        return Finding(RED, f"failed: {printable(f'{type(error).__name__}: {first_line(error)}', 200)}")


# ---- before weights are loaded


def kernel(device: str | None, dtype: str | None) -> Finding:
    """A convolution, a norm and attention on the device, against the CPU: new cards with old builds fail here."""
    place = loading.pick_device(device)
    kind = loading.DTYPES[dtype or ("float16" if place.type == "cuda" else "float32")]
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "the processor"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 16, 16, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator) / 24

    def layers(x: Tensor, weight: Tensor) -> Tensor:
        h = F.silu(F.group_norm(F.conv2d(x, weight, padding=1), 16)).flatten(2).mT
        return attention(*[h.unflatten(2, (4, 16)).transpose(1, 2)] * 3)

    try:
        out = layers(x.to(place, kind), weight.to(place, kind)).float().cpu()
    except Exception as error:
        return Finding(
            RED,
            f"{name} does not run this PyTorch's kernels: {printable(first_line(error), 120)}",
            f"install a PyTorch made for this card (this is {torch.__version__}, see pytorch.org), or add --device cpu",
        )
    error = distance(out, layers(x, weight))
    told = f"{name} with PyTorch {torch.__version__}, {str(kind).removeprefix('torch.')}: off by {error:.1e}"
    if not error < LIMITS[kind]:
        return Finding(
            RED, f"{told}, and only {LIMITS[kind]:g} is rounding", "another driver or PyTorch; or --device cpu"
        )
    return Finding(GREEN, told)


def which(subject: Subject) -> Finding:
    """Which weights these are, and whether they are the released bytes."""
    editor, path = subject.editor, subject.path
    told = f"{path}, {editor.family} weights"
    if str(path) == "random":
        return Finding(RED, "random numbers", "leave --weights out, or name a file")
    if subject.kind == "toy":
        others = unlike_shipped(editor)
        if not others:
            return Finding(GREEN, f"{told}: the small model that ships, for its scenes; photos need `emilie download`")
        told += f": not the small model that ships, {' and '.join(others)} of another training or damaged"
        return Finding(YELLOW, told, "leave --weights out for the one that ships")
    if path.is_dir():
        return Finding(YELLOW, f"{told}: a folder that diffusers wrote; whether as released is not known")
    notes = reading.metadata(path) or {}
    others = changed_since(path, notes)
    if others:
        told += f": {' and '.join(others)} changed since `emilie convert` wrote this file"
        return Finding(RED, told, "convert again, or `emilie download`")
    if notes.get("sha256") in RELEASED:
        return Finding(GREEN, f"{told}: made from the released {RELEASED[notes['sha256']]}, whose sha256 was verified")
    if "source" not in notes and hash_file(path) in RELEASED:
        return Finding(GREEN, f"{told}: the released bytes, by their sha256")
    return Finding(YELLOW, f"{told}: whether from the released file is not known", "`emilie download` verifies that")


def unlike_shipped(editor: Editor) -> list[str]:
    """The networks whose numbers are not those of the small model that ships."""
    shipped, others = loading.load(device="cpu", plain=True), []
    for part, name in PARTS.items():
        own, their = (dict(getattr(e, part).named_parameters()) for e in (editor, shipped))
        if own.keys() != their.keys() or any(not same(own[key], their[key]) for key in own):
            others.append(name)
    return others


def same(a: Tensor, b: Tensor) -> bool:
    """Whether a tensor is another, as far as its precision goes."""
    return a.shape == b.shape and torch.equal(a.cpu(), b.to(a.dtype))


def changed_since(path: Path, notes: dict[str, str]) -> list[str]:
    """The networks that are not what `convert` noted when it wrote them; of another's file nothing is known."""
    noted = {part: notes.get(f"sha256.{part}") for part in PARTS}
    if None in noted.values():
        return []
    with safe_open(path, framework="pt") as file:
        found = digests(file.keys(), file.get_tensor)
    return [PARTS[part] for part, digest in noted.items() if found[part] != digest]


# ---- with them


def numbers(subject: Subject) -> Finding:
    """Every number is one, and no layer's weights are all zero, as training leaves none."""
    wrong, count = [], 0
    for part, name in PARTS.items():
        for key, tensor in getattr(subject.editor, part).named_parameters():
            count += 1
            if not tensor.isfinite().all():
                wrong.append(f"{name}'s {key} has numbers that are not finite")
            elif key.endswith("weight") and not tensor.any():
                wrong.append(f"{name}'s {key} is all zeros")
    if wrong:
        return Finding(RED, wrong[0] + f", and {len(wrong) - 1} more such" * (len(wrong) > 1), WEIGHTS)
    return Finding(GREEN, f"{count} tensors, all finite, no layer zero")


def words(subject: Subject) -> Finding:
    """Known sentences have known ids, and the text model tells texts apart."""
    editor, text = subject.editor, subject.editor.text
    for sentence, ids in SENTENCES[subject.kind].items():
        row = text.tokenize([sentence])[0].tolist()
        wanted = [text.config.bos_token_id, *ids, text.config.eos_token_id]
        if row[: len(wanted)] != wanted:
            return Finding(
                RED,
                f'"{sentence}" has the ids {row[: len(wanted)]} and not {wanted}: another tokenizer',
                "`emilie download --tokenizer` fetches CLIP's; --tokenizer names its folder",
            )
    contexts = editor.context([subject.text, ""]).float()
    if not contexts.isfinite().all():
        return Finding(RED, "the text model's output is not finite", WEIGHTS)
    apart = distance(contexts[0], contexts[1])
    if not apart > EFFECT:
        return Finding(RED, f"to the text model all texts are the same ({apart:.1e} apart)", WEIGHTS)
    return Finding(GREEN, f'known ids of known sentences; "{subject.text}" and "" are {apart:.2g} apart')


def back(subject: Subject) -> Finding:
    """A picture through the autoencoder and back."""
    z = subject.editor.scale_factor * subject.z_img()
    error = np.square(levels(images.from_latent(subject.editor, z)) - levels(subject.picture)).mean()
    db = 10 * np.log10(255**2 / max(error, 1e-9))
    spread = z.std().item()
    least, (low, high) = BACK[subject.kind], SPREAD
    rests = {"toy": "measured", "ip2p": "published"}[subject.kind]
    told = (
        f"{db:.1f} dB ({rests}: {least:g} or more); the latent's spread is {spread:.2f} (by theory {low:g} to {high:g})"
    )
    if db >= least and low < spread < high:
        return Finding(GREEN, told)
    half = "decoder, or the encoder" if low < spread < high else "encoder"
    status = YELLOW if db >= 0.8 * least and low / 1.5 < spread < high * 1.5 else RED
    return Finding(status, told, f"the autoencoder's {half}: {WEIGHTS}")


def noise(subject: Subject) -> Finding:
    """The noise that was added, as the network predicts it where it sees the picture and no instruction."""
    editor, z_img = subject.editor, subject.z_img().cpu()
    null, z, status, cosines = editor.context([""]), editor.scale_factor * z_img, GREEN, []
    for sigma, least in NOISE[subject.kind].items():
        x = (z + sigma * subject.noise).to(editor.device)
        (denoised,) = editor.branches([x], sigma, [z_img.to(editor.device)], [null])
        eps = ((x - denoised) / sigma).cpu()
        cosine = F.cosine_similarity(eps.flatten(), subject.noise.flatten(), dim=0).item()
        cosines.append(cosine if eps.isfinite().all() else float("nan"))
        if not cosines[-1] >= least:
            status = RED if status == RED or not cosines[-1] >= 2 * least - 1 else YELLOW
    if any(math.isnan(cosine) for cosine in cosines) and editor.dtype != torch.float32:
        return Finding(RED, f"the UNet overflows in {str(editor.dtype).removeprefix('torch.')}", "add --dtype float32")
    expected = NOISE[subject.kind]
    found = ", ".join(f"{cosine:.4g}" for cosine in cosines)
    told = f"cosine {found} at sigma {', '.join(f'{sigma:g}' for sigma in expected)}"
    expected = ", ".join(f"{least:g}" for least in expected.values())
    told += f" (expected {expected} or more, {RESTS[subject.kind]}; random weights have 0)"
    remedy = f"the UNet, unless another network is named above: {WEIGHTS}"
    return Finding(status, told, "" if status == GREEN else remedy)


def effects(subject: Subject) -> Finding:
    """Guidance has something to guide by: text and picture each change what the network predicts."""
    editor, sigma = subject.editor, 8.0
    z_img = subject.z_img().to(editor.device)
    cond, null = editor.context([subject.text, ""]).split(1)
    x = sigma * subject.noise.to(editor.device)
    told, seen, nothing = editor.branches([x] * 3, sigma, [z_img, z_img, torch.zeros_like(z_img)], [cond, null, null])
    by_text, by_picture = distance(told, seen), distance(seen, nothing)
    found = f"the instruction changes the prediction by {by_text:.2g}, the picture by {by_picture:.2g} of it"
    if not by_text > EFFECT:
        return Finding(RED, f"{found}: the UNet does not hear the text", WEIGHTS)
    if not by_picture > EFFECT:
        return Finding(RED, f"{found}: the UNet does not see the picture (is this Stable Diffusion?)", WEIGHTS)
    return Finding(GREEN, found)


def edit(subject: Subject) -> Finding:
    """A short edit: everywhere, and in a mask, outside which pixels and latent stay to the bit.

    The small model's, which takes its own steps, must be right.
    """
    side, factor, editor = subject.side, subject.editor.vae.factor, subject.editor
    canvas = open_canvas(subject.picture, editor, 0, side)
    start = canvas.latent
    steps = editor.config.sampling.steps if subject.kind == "toy" else STEPS if editor.device.type == "cuda" else 2
    everywhere, right = changed(canvas.image, canvas.edit(subject.text, steps=steps)), True
    if subject.kind == "toy" and subject.text == "make it night":
        right = judge(canvas.image, replace(world.scene(3), style="night")).correct
    canvas.undo()
    box = (0, 0, side // 2 // factor * factor, side)
    inside = changed(canvas.image, canvas.edit(subject.text, box, steps=steps, keep_background=True), canvas.state.mask)
    pixels = (levels(canvas.image) == levels(subject.picture))[:, box[2] :].all()
    cells = torch.equal(canvas.latent[..., box[2] // factor :], start[..., box[2] // factor :])
    found = f"{steps} steps change {everywhere:.0%} of the picture, in a mask {inside:.0%} of it"
    if not (pixels and cells):
        what = "pixels" if cells else "the latent"
        return Finding(RED, f"{found}; outside the mask {what} moved", "this is a fault of the program: report it")
    found += "; outside nothing moved, to the bit"
    if not right:
        told = f"{found}; but the picture is not what was asked for"
        return Finding(RED, told, f"what is not green above, else the UNet or the text model: {WEIGHTS}")
    if min(everywhere, inside) == 0:
        return Finding(
            YELLOW, f"{found}; but an edit that changes nothing is none", "raise --text-scale; see the above"
        )
    return Finding(GREEN, found)


def paths(subject: Subject) -> Finding:
    """The path that edits take against the network as it reads."""
    editor = subject.editor
    plain = Editor(editor.config, editor.unet, editor.vae, editor.text, editor.device, editor.dtype)
    z_img = subject.z_img().to(editor.device)
    cond, null = editor.context([subject.text, ""]).split(1)
    x, scales = 3.0 * subject.noise.to(editor.device), (editor.config.sampling.text_scale, 1.5)
    fast, slow = (each.denoise(x, 3.0, z_img, cond, null, *scales) for each in (editor, plain))
    error, limit = distance(fast, slow), LIMITS[editor.dtype]
    name = type(editor).__name__
    if type(editor) is Editor:
        return Finding(GREEN, "this is the network as it reads")
    if not error < limit:
        return Finding(
            RED, f"{name} is off by {error:.1e}, and only {limit:g} is rounding", "add --plain, and report it"
        )
    return Finding(GREEN, f"{name} is off by {error:.1e} (rounding: {limit:g})")


def half(subject: Subject) -> Finding:
    """In half precision: no overflow, and the picture that float32 gives."""
    editor = subject.editor
    name = str(editor.dtype).removeprefix("torch.")
    z = editor.scale_factor * subject.z_img()  # which raises where it is not finite
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        decoded = editor.decode(z)
    if not decoded.isfinite().all():
        return Finding(RED, f"decoding overflows in {name}", "add --dtype float32, or bfloat16")
    if editor.dtype == torch.float32:
        return Finding(GREEN, "float32: nothing to overflow")
    if hasattr(editor, "bring"):
        return Finding(GREEN, f"{name}: finite; not compared with float32 in low memory")
    vae = copy.deepcopy(editor.vae).float()
    exact = vae.decode((z.to(editor.device) / editor.scale_factor).float())
    levels_off = (decoded.clamp(-1, 1) - exact.clamp(-1, 1)).abs().mean().item() * 127.5
    if any("overflowed" in str(each.message) for each in said):
        return Finding(
            YELLOW, f"decoding overflows in {name}, and is done in float32", "it may be the weights; see above"
        )
    told = f"{name}: finite, {levels_off:.3f} grey levels from float32 on average (expected 1 or less)"
    if levels_off <= 1:
        return Finding(GREEN, told)
    return Finding(YELLOW if levels_off <= 4 else RED, told, "add --dtype float32, or bfloat16")


def memory(subject: Subject) -> Finding:
    """The peak of all the above."""
    if subject.editor.device.type == "cuda":
        peak, whole = (
            torch.cuda.max_memory_reserved(),
            torch.cuda.get_device_properties(subject.editor.device).total_memory,
        )
        where = "on the card"
    else:
        peak, free, where = peak_rss(), available_memory(), "of main memory"
        whole = None if free is None else peak + free
    told = f"{peak / 1e9:.1f} GB {where} at the peak" + (
        "" if whole is None else f", of {whole / 1e9:.1f} GB to be had"
    )
    if whole is not None and peak > 0.9 * whole:
        return Finding(YELLOW, told, "add --low-memory, or lower --resolution")
    return Finding(GREEN, told)


def duration(subject: Subject) -> Finding:
    """How long an edit takes at the model's own size and steps, by one guided step of it."""
    editor, s = subject.editor, subject.editor.config.sampling
    full = Subject(editor, subject.path, s.resolution)
    cuda = editor.device.type == "cuda"
    z_img = torch.zeros_like(full.noise).to(editor.device)
    cond, null = editor.context([full.text, ""]).split(1)
    seconds = []
    for sigma in (3.0, 1.0) if not cuda else (3.0, 2.0, 1.0, 0.5, 0.4, 0.3):  # CUDA graphs are recorded meanwhile
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        editor.denoise(full.noise.to(editor.device), sigma, z_img, cond, null, s.text_scale, s.image_scale)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if seconds[-1] > 2:  # which no first call's extras matter to
            break
    whole = min(seconds) * s.steps
    told = (
        f"about {whole:.1f} s for an edit of {s.steps} steps at {s.resolution} px ({min(seconds) * 1e3:.0f} ms a step)"
    )
    small = cuda and torch.cuda.get_device_properties(editor.device).total_memory < 6e9
    if small and not hasattr(editor, "bring"):
        return Finding(YELLOW, told, "a card of less than 6 GB: --low-memory leaves room")
    if whole > LONG:
        return Finding(
            YELLOW, told, f"--steps {max(1, s.steps // 5)} takes a fifth; --reuse 3 half, near the same picture"
        )
    return Finding(GREEN, told, "--compile is faster still, after a first wait" if cuda and whole > 1 else "")


WEIGHTS = "these weights are damaged or of another model: `emilie download` fetches and verifies the released ones"
CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "numbers": numbers,
    "text": words,
    "autoencoder": back,
    "noise": noise,
    "guidance": effects,
    "a short edit": edit,
    "fast and plain": paths,
    "half precision": half,
    "memory": memory,
    "time": duration,
}


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|; NaN where one is not finite."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()
