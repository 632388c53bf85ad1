"""What is measured of a finished edit: on the pictures, against the small world's truth, and by CLIP, BLIP and LPIPS.

Pictures are PIL images or uint8 arrays (H, W, 3), in one comparison of one size, else ImageError. A mask or region is
PIL, or uint8 or bool (H, W), white (128 and more, or True) where an edit was to change something, else MaskError: those
pixels are left out, so that nothing in them changes a number. Where every pixel is left out, the answer is None.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ..errors import BenchError, ImageError, MaskError, first_line, printable
from ..toy import judge, words, world
from .data import Turn

if TYPE_CHECKING:
    from torch import Tensor

Picture = Image.Image | np.ndarray
Values = Mapping[str, Sequence[float | None]]  # of each item, over seeds and turns; None or NaN where missing
CLIP, BLIP = "openai/clip-vit-large-patch14", "Salesforce/blip-image-captioning-large"
PSNR_CAP = 100.0  # dB: what identical pictures count as, so that a mean over pictures stays a number
RADIUS = 5  # px, of SSIM's window
BATCH = 16
LONGEST = {"Blip": 30, "Blip2": 48}  # tokens of a caption


class Metric(NamedTuple):
    """How a table shows a number of `measure_turn`."""

    title: str
    unit: str  # "share" in [0, 1], of turns (true or false each) or of changes; "" for plain numbers
    better: str  # "higher" or "lower"
    what: str


METRICS = {
    "correct": Metric("correct", "share", "higher", "the whole picture shows the right scene, cleanly drawn"),
    "edited": Metric("edited", "share", "higher", "what this turn had to change is right"),
    "kept": Metric("kept", "share", "higher", "all else is as it should be by now, earlier turns' faults included"),
    "retained": Metric("edits shown", "share", "higher", "of all changes so far that still stand, those that show"),
    "lost": Metric("edits lost", "share", "lower", "of earlier changes that showed before this turn, those now gone"),
    "misplaced": Metric("position", "share", "lower", "wrong only in that a thing is more than 2 px off its position"),
    "wrong_thing": Metric("wrong thing", "share", "lower", "wrong in a colour, a shape, the background or the style"),
    "unclean": Metric("unclean", "share", "lower", "wrong only in how cleanly it is drawn, but for positions"),
    "psnr_target": Metric("PSNR to target", "dB", "higher", "against the right picture, everywhere"),
    "l1_target": Metric("L1 to target", "grey levels", "lower", "against the right picture, everywhere"),
    "psnr_inside": Metric("PSNR inside", "dB", "higher", "against the right picture, inside the turn's region"),
    "psnr_outside": Metric("PSNR outside", "dB", "higher", "against the picture before, outside the turn's region"),
    "ssim_outside": Metric("SSIM outside", "", "higher", "against the picture before, outside the turn's region"),
    "l1_outside": Metric("L1 outside", "grey levels", "lower", "against the picture before, outside the turn's region"),
    "lpips_outside": Metric("LPIPS outside", "", "lower", "against the picture before, outside the turn's region"),
    "psnr_first": Metric("PSNR to first", "dB", "higher", "against the input, outside all regions so far"),
    "l1_first": Metric("L1 to first", "grey levels", "lower", "against the input, outside all regions so far"),
    "clip": Metric("CLIP score", "", "higher", "cosine of the picture and the instruction"),
    "clip2": Metric("second CLIP's score", "", "higher", "likewise, by the other CLIP"),
    "clip_caption": Metric("CLIP to caption", "", "higher", "cosine of the picture and the right result's caption"),
    "blip": Metric("BLIP score", "", "higher", "cosine of BLIP's caption of the picture and the instruction"),
    "borne_out": Metric("borne out", "share", "higher", "BLIP's caption, read as a scene, is as the instruction asks"),
    "direction": Metric("CLIP direction", "", "higher", "cosine of the picture's change and the captions' change"),
    "clip_image": Metric("CLIP image", "", "higher", "cosine of the picture and the one before"),
}


# ---- pictures


def _rgb(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if getattr(picture, "dtype", None) != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ImageError("a picture to measure must be a PIL image or a uint8 array (H, W, 3)")
    return Image.fromarray(picture)


def _key(image: Image.Image) -> tuple:
    """What two pictures have in common only if they are the same."""
    return image.size, hashlib.sha256(image.tobytes()).digest()


def _white(mask: Picture, shape: tuple[int, int]) -> np.ndarray:
    array = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask)
    if array.shape != shape or array.dtype not in (np.uint8, bool):
        raise MaskError(f"a mask of shape {array.shape}, {array.dtype}, for pictures of {shape}: give uint8 or bool")
    return array if array.dtype == bool else array >= 128


def _union(masks: Sequence[Picture | None], shape: tuple[int, int]) -> np.ndarray:
    """Where any mask is white, bool (H, W); everywhere if one is None, an edit of the whole picture."""
    return np.any([np.ones(shape, bool) if mask is None else _white(mask, shape) for mask in masks], axis=0)


def _pair(a: Picture, b: Picture, mask: Picture | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two pictures as float64 (H, W, 3), and which pixels count, bool (H, W)."""
    a, b = (np.asarray(_rgb(picture), dtype=np.float64) for picture in (a, b))
    if a.shape != b.shape:
        raise ImageError(f"pictures of {a.shape[1]}x{a.shape[0]} and {b.shape[1]}x{b.shape[0]} px: make them one size")
    return a, b, np.ones(a.shape[:2], bool) if mask is None else ~_white(mask, a.shape[:2])


def _mean(values: np.ndarray, counts: np.ndarray) -> float | None:
    return float(values[counts].mean()) if counts.any() else None


def l1(a: Picture, b: Picture, mask: Picture | None = None) -> float | None:
    """Mean absolute difference of the channels, grey levels in [0, 255]."""
    a, b, counts = _pair(a, b, mask)
    return _mean(np.abs(a - b), counts)


def psnr(a: Picture, b: Picture, mask: Picture | None = None) -> float | None:
    """scikit-image's peak signal-to-noise ratio over the pixels that count, dB, `PSNR_CAP` at most."""
    a, b, counts = _pair(a, b, mask)
    if not counts.any():
        return None
    with np.errstate(divide="ignore"):  # of identical ones it is infinite
        return min(PSNR_CAP, float(_skimage().peak_signal_noise_ratio(a[counts], b[counts], data_range=255)))


def ssim(a: Picture, b: Picture, mask: Picture | None = None) -> float | None:
    """Structural similarity (Wang et al. 2004) of the channels, in [-1, 1]: the mean of scikit-image's map.

    Gaussian window of 11x11, sigma 1.5, population covariance. Only pixels count whose whole window lies in the
    picture and touches no masked pixel; without a mask that is `structural_similarity`'s own mean.
    """
    a, b, counts = _pair(a, b, mask)
    if min(counts.shape) <= 2 * RADIUS:
        raise ImageError(f"SSIM needs pictures of {2 * RADIUS + 1} px a side at least")
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, values = _skimage().structural_similarity(a, b, data_range=255, channel_axis=2, full=True, **gaussian)
    touched = Image.fromarray(~counts).convert("L").filter(ImageFilter.MaxFilter(2 * RADIUS + 1))
    inner = (slice(RADIUS, -RADIUS),) * 2
    return _mean(values[inner], np.asarray(touched)[inner] == 0)


def _skimage():
    try:
        from skimage import metrics
    except ImportError as cause:
        raise BenchError("PSNR and SSIM need scikit-image: pip install 'emilie_min[bench]'") from cause
    return metrics


# ---- the small world's truth


def _facts(scene: world.Scene) -> set[tuple]:
    at = {o.place: (o.shape, o.colour) for o in scene.objects}
    things = {(place, *fact) for place in world.PLACES for fact in enumerate(at.get(place, (None, None)))}
    return things | {("background", scene.background), ("style", scene.style)}


def _shown(image: Picture, truth: world.Scene) -> set[tuple]:
    """The facts of a scene that a picture shows; nothing of a thing that is out of its position."""
    if _rgb(image).size != (world.SIZE, world.SIZE):
        raise ImageError(f"the small world's pictures have {world.SIZE}x{world.SIZE} px: run its model at that size")
    seen, at = judge.read(image).scene, {o.place: o for o in truth.objects}
    offs = [(o, at.get(o.place, o)) for o in seen.objects]
    near = [o for o, want in offs if max(abs(o.dx - want.dx), abs(o.dy - want.dy)) <= judge.TOLERANCE]
    return _facts(replace(seen, objects=near)) & _facts(truth)


def _share(outcomes: list[bool]) -> float | None:
    return float(np.mean(outcomes)) if outcomes else None


def world_verdict(image: Picture | None, truths: Sequence[world.Scene], before: Picture | None = None) -> dict:
    """Whether a picture is what its chain of instructions asked for: {"correct", "edited", "kept", "retained", "lost"}.

    image: 64x64, else ImageError; None = the chain has ended with an error, and all is wrong. truths: the input's scene
    and the right one after each turn so far; before: the picture before the last turn.
    correct, edited, kept: by `toy.judge.judge`, of the last truth given the one before it. The truth is what the
    instructions lead to, whatever the picture before was, so an earlier turn's fault is not "kept".

    A scene's facts are its background, its style, and each place's shape and colour, both None where it is empty. A
    turn's change is the facts that are new in its truth; of these stand those that no later turn changed, were it back
    again. A change shows if all of it that stands is what `toy.judge.read` sees, clean or not, within its TOLERANCE.
    retained: of the turns so far, this one included, of whose change something stands, the share whose change shows.
    lost: of the earlier ones of these whose change showed in `before`, the share whose change shows no more.
    Both are None where there is no such turn.
    """
    facts = [_facts(truth) for truth in truths]
    changes = [set.intersection(*facts[turn:]) - facts[turn - 1] for turn in range(1, len(facts))]  # that stand
    changes = [change for change in changes if change]
    if image is None:
        wrong = dict.fromkeys(("correct", "edited", "kept"), False)
        return wrong | {"retained": 0.0 if changes else None, "lost": None}
    shown, had = _shown(image, truths[-1]), set() if before is None else _shown(before, truths[-2])
    verdict = judge.judge(image, truths[-1], truths[-2])
    showed = [change for change in changes if change <= had]  # this turn's is not in the truth before
    return {
        "correct": verdict.correct,
        "edited": verdict.edited,
        "kept": verdict.kept,
        "retained": _share([change <= shown for change in changes]),
        "lost": _share([not change <= shown for change in showed]),
    }


def blame(*verdicts: judge.Verdict | None) -> dict[str, bool]:
    """The worst fault of a wrong picture by the judge's reading, one of three or, of a right one, none.

    "wrong_thing": a colour, shape, background or style, or no picture at all; else "misplaced": a thing is out of
    position; else "unclean": all is there and badly drawn.
    """
    faults = [fault for v in verdicts if v for fault in v.why.split("; ") if fault]
    misplaced = any(fault.endswith("out of position") for fault in faults)
    wrong = None in verdicts or any(", not " in fault for fault in faults)
    return {
        "misplaced": misplaced and not wrong,
        "wrong_thing": wrong,
        "unclean": bool(faults) and not wrong and not misplaced,
    }


def part_verdict(image: Picture | None, truth: world.Scene, before: world.Scene, region: np.ndarray) -> dict:
    """`world_verdict`'s correct, edited and kept, and `blame`, of an edit of a part: bool (64, 64), True inside.

    edited: what is inside, with the truth around it, is judged right; kept: likewise what is outside, and the scene
    before. correct: both.
    """
    if image is None:
        return dict.fromkeys(("correct", "edited", "kept"), False) | blame(None)
    pixels, inside = np.asarray(_rgb(image)), region[..., None]
    edited = judge.judge(np.where(inside, pixels, world.pixels(truth)), truth)
    kept = judge.judge(np.where(inside, world.pixels(before), pixels), before)
    right = {"correct": edited.correct and kept.correct, "edited": edited.correct, "kept": kept.correct}
    return right | blame(edited, kept)


# ---- scores by pretrained networks, each loaded when its scorer is made


def _load(name: str | Path, model: str, processor: str, device: str) -> tuple:
    """(network, image processor, tokenizer): from a folder; by a hub's name from its cache, else by a download.

    The image processor is the one for PIL pictures, whether torchvision is there or not. Raises BenchError.
    """
    import transformers
    from huggingface_hub import snapshot_download
    from transformers.utils import logging

    from ..checkpoint.networks import not_finite
    from ..loading import pick_device

    hush_hub()
    device, folder, verbosity = pick_device(device), Path(name).is_dir(), logging.get_verbosity()
    kind = getattr(transformers, processor + "Pil", None) or getattr(transformers, processor)  # as in 5.0
    for local in (True,) if folder else (True, False):
        try:
            logging.set_verbosity_error()  # its page on missing tensors becomes one line below
            place = snapshot_download(name, local_files_only=True) if local and not folder else str(name)
            where = {"pretrained_model_name_or_path": place, "local_files_only": local}
            network, report = getattr(transformers, model).from_pretrained(
                **where, dtype="float32", output_loading_info=True
            )
            images, tokenizer = kind.from_pretrained(**where), transformers.AutoTokenizer.from_pretrained(**where)
            break
        except Exception as error:  # of whatever type its files or the network provoke
            cause = error
        finally:
            logging.set_verbosity(verbosity)
    else:
        what = "is neither a folder nor in the hub's cache, and cannot be downloaded: give a folder, or go online"
        what = f"does not hold a {model} with tokenizer and image processor: copy all its files" if folder else what
        raise BenchError(f"{name} {what} ({printable(first_line(cause), 160)})") from cause
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise BenchError(f"{name} is not a {model}: it lacks {len(missing)} tensors, such as {missing[0]}")
    if len(tokenizer) < network.config.text_config.vocab_size / 2:  # without its files it would come empty
        raise BenchError(f"{name} lacks its tokenizer: copy tokenizer.json, or the vocabulary and merges, too")
    if wrong := not_finite(network):
        raise BenchError(f"{name} is damaged: {wrong} is not finite. Copy all its files anew")
    return network.eval().to(device), images, tokenizer


def hush_hub() -> None:
    """That it tries again goes unsaid: what comes of it is told in a line."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def is_blip2(name: str | Path) -> bool:
    """By its config; what has none is told by `_load`."""
    import transformers

    hush_hub()
    for local in (True,) if Path(name).is_dir() else (True, False):
        try:
            return transformers.AutoConfig.from_pretrained(name, local_files_only=local).model_type == "blip-2"
        except Exception:  # of whatever type its files or the network provoke
            continue
    return False


class ClipScorer:
    """CLIP (Radford et al. 2021): pictures and texts in one space. Each is embedded once, and kept.

    model: a folder in the hub's format, or a hub's name; InstructPix2Pix uses ViT-L/14, and EMILIE does not say.
    Pictures are scaled and centre-cropped as CLIP's own preprocessing does it. Raises BenchError.
    """

    def __init__(self, model: str | Path = CLIP, device: str = "cpu"):
        self.model, self.processor, self.tokenizer = _load(model, "CLIPModel", "CLIPImageProcessor", device)
        self._known: dict[object, Tensor] = {}

    def image(self, images: Sequence[Picture]) -> "Tensor":
        """(N, D) float32 on the CPU, of unit length."""
        images = [_rgb(image) for image in images]
        keys = [_key(image) for image in images]
        return self._embed(dict(zip(keys, images)), keys, self._image)

    def text(self, texts: Sequence[str]) -> "Tensor":
        """(N, D) float32 on the CPU, of unit length. What a text has beyond 77 tokens is cut off, with a warning."""
        return self._embed({text: text for text in texts}, texts, self._text)

    def _image(self, images: list[Image.Image]):
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixel_values=pixels.to(self.model.device))

    def _text(self, texts: list[str]):
        limit = self.model.config.text_config.max_position_embeddings
        for text, ids in zip(texts, self.tokenizer(texts, truncation=True, max_length=limit + 1)["input_ids"]):
            if len(ids) > limit:
                warnings.warn(f'CLIP reads {limit} tokens: the end of "{text[:40]}..." is cut', stacklevel=2)
        tokens = self.tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device))

    def _embed(self, inputs: dict, keys: Sequence, features: Callable) -> "Tensor":
        import torch

        new = [key for key in inputs if key not in self._known]
        for batch in (new[i : i + BATCH] for i in range(0, len(new), BATCH)):
            with torch.no_grad():
                out = features([inputs[key] for key in batch])
            self._known |= zip(batch, torch.nn.functional.normalize(out.pooler_output.float(), dim=-1).cpu())
        return torch.stack([self._known[key] for key in keys])

    def clip_score(self, image: Picture, instruction: str) -> float:
        """Cosine of picture and instruction, in [-1, 1], neither scaled nor clipped."""
        return float(self.image([image])[0] @ self.text([instruction])[0])

    def image_similarity(self, before: Picture, after: Picture) -> float:
        """Cosine of two pictures, as InstructPix2Pix reports it."""
        return float(self.image([before])[0] @ self.image([after])[0])

    def direction_similarity(self, before: Picture, after: Picture, caption_before: str, caption_after: str) -> float:
        """Cosine of the picture's change and its caption's (Gal et al. 2022), as InstructPix2Pix reports it.

        0 where picture or caption does not change at all.
        """
        (x0, x1), (t0, t1) = self.image([before, after]), self.text([caption_before, caption_after])
        return float((x1 - x0) @ (t1 - t0) / ((x1 - x0).norm() * (t1 - t0).norm()).clamp(min=1e-12))


class BlipScorer:
    """BLIP (Li et al. 2022), or BLIP-2, says what a picture shows, which is compared with what was asked for.

    EMILIE names neither the checkpoint nor how the two texts are compared: CLIP's text cosine is our choice, so values
    compare with one another and not with the paper's. Raises BenchError.
    """

    def __init__(self, clip: ClipScorer, model: str | Path = BLIP, device: str = "cpu"):
        kind, self.clip = ("Blip2" if is_blip2(model) else "Blip"), clip
        self.longest = LONGEST[kind]
        loaded = _load(model, f"{kind}ForConditionalGeneration", "BlipImageProcessor", device)
        self.model, self.processor, self.tokenizer = loaded
        self._known: dict[object, str] = {}

    def captions(self, images: Sequence[Picture]) -> list[str]:
        """Greedy captions, of `LONGEST` tokens at most. Each is made once, and kept."""
        images = [_rgb(image) for image in images]
        keys = [_key(image) for image in images]
        new = {key: image for key, image in zip(keys, images) if key not in self._known}
        for i in range(0, len(new), BATCH):
            batch = dict(list(new.items())[i : i + BATCH])
            pixels = self.processor(images=list(batch.values()), return_tensors="pt")["pixel_values"]
            options = {"do_sample": False, "num_beams": 1, "max_new_tokens": self.longest}
            ids = self.model.generate(pixels.to(self.model.device), **options)
            texts = self.tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)  # without its own start token
            self._known |= zip(batch, [text.strip() for text in texts])
        return [self._known[key] for key in keys]

    def borne_out(self, image: Picture, instruction: str) -> bool | None:
        """Whether a caption of the small world is as one of its instructions asks; None for another instruction."""
        if instruction not in set(world.instructions()):
            return None
        (caption,) = self.captions([image])
        seen = words.said(caption)
        return seen is not None and words.holds(words.asked(instruction), seen)

    def blip_score(self, image: Picture, instruction: str) -> float:
        """Cosine of the picture's caption and the instruction, in [-1, 1]."""
        caption, asked = self.clip.text([*self.captions([image]), instruction])
        return float(caption @ asked)


class LpipsScorer:
    """LPIPS (Zhang et al. 2018), AlexNet, version 0.1, by the package `lpips`. Raises BenchError without it."""

    def __init__(self, device: str = "cpu"):
        from ..loading import pick_device

        self.device = pick_device(device)
        try:
            from lpips import LPIPS

            self.net = LPIPS(net="alex", spatial=True, verbose=False).to(self.device)
        except ImportError as cause:
            raise BenchError("LPIPS needs its package: pip install lpips") from cause
        except Exception as cause:  # its AlexNet is torchvision's, from the network at first
            raise BenchError(f"LPIPS cannot be loaded, go online once ({printable(first_line(cause), 160)})") from cause

    def lpips_distance(self, a: Picture, b: Picture, mask: Picture | None = None) -> float | None:
        """The mean of its map over the pixels that count, the others being made the same in both pictures before."""
        import torch

        a, b, counts = _pair(a, b, mask)
        pair = np.stack([a, np.where(counts[..., None], b, a)]) / 127.5 - 1
        x, y = torch.from_numpy(pair).float().permute(0, 3, 1, 2).to(self.device)[:, None]
        with torch.no_grad():
            return _mean(self.net(x, y)[0, 0].cpu().numpy(), counts)


class Scorers(NamedTuple):
    """The networks to score with; None: not asked for."""

    clip: ClipScorer | None = None
    blip: BlipScorer | None = None
    lpips: LpipsScorer | None = None
    clip2: ClipScorer | None = None


NO_SCORERS = Scorers()


def load_scorers(
    clip: str | None, blip: str | None, lpips: bool, clip2: str | None = None, device: str = "cpu"
) -> Scorers:
    """clip, blip, clip2: a folder in the hub's format or a hub's name; BLIP needs CLIP. Raises BenchError."""
    scorer = ClipScorer(clip, device) if clip else None
    captioner = BlipScorer(scorer, blip, device) if blip else None
    other = ClipScorer(clip2, device) if clip2 else None
    return Scorers(scorer, captioner, LpipsScorer(device) if lpips else None, other)


# ---- one turn, and many


@dataclass(frozen=True)
class Edit:
    """One turn of a chain as it is measured. All pictures have the working size."""

    before: Picture | None
    after: Picture | None  # None: the chain has ended with an error, so it is wrong where there is a truth
    first: Picture  # the chain's input
    turns: Sequence[Turn]  # of the chain so far, this one last; their regions, masks and targets are pictures
    caption: str | None = None  # of the chain's input
    truth: world.Scene | None = None  # of the chain's input


def measure_turn(edit: Edit, scorers: Scorers = NO_SCORERS) -> dict[str, float | bool | None]:
    """Everything in `METRICS` that can be said of one turn.

    What lies outside is told by each turn's region, else by its mask; one that has neither leaves nothing outside. The
    target is the turn's or, without one, its truth's picture. Keys are absent where their scorer, the target or one of
    the truths is not there; values are None where there is nothing to measure.
    """
    before, after, first, turn = edit.before, edit.after, edit.first, edit.turns[-1]
    clip, blip, lpips, clip2 = scorers
    truths = [edit.truth, *(t.truth for t in edit.turns)]
    captions = [edit.caption, *(t.caption for t in edit.turns)][-2:]
    regions = [t.mask if t.region is None else t.region for t in edit.turns]
    target = world.render(truths[-1]) if turn.target is None and None not in truths else turn.target
    shape = _rgb(first).size[::-1]
    region, ever = _union(regions[-1:], shape), _union(regions, shape)
    if None in truths:
        out = {}
    elif turn.within:
        out = part_verdict(after, *truths[:-3:-1], region)
    else:
        out = world_verdict(after, truths, before) | blame(None if after is None else judge.judge(after, truths[-1]))
    measures = {
        "psnr_target": lambda: psnr(target, after),
        "l1_target": lambda: l1(target, after),
        "psnr_inside": lambda: psnr(target, after, ~region),
        "psnr_outside": lambda: psnr(before, after, region),
        "ssim_outside": lambda: ssim(before, after, region),
        "l1_outside": lambda: l1(before, after, region),
        "lpips_outside": lambda: lpips.lpips_distance(before, after, region),
        "psnr_first": lambda: psnr(first, after, ever),
        "l1_first": lambda: l1(first, after, ever),
        "clip": lambda: clip.clip_score(after, turn.instruction),
        "clip2": lambda: clip2.clip_score(after, turn.instruction),
        "clip_caption": lambda: clip.clip_score(after, turn.caption) if turn.caption else None,
        "blip": lambda: blip.blip_score(after, turn.instruction),
        "borne_out": lambda: None if None in truths else blip.borne_out(after, turn.instruction),
        "direction": lambda: clip.direction_similarity(before, after, *captions) if all(captions) else None,
        "clip_image": lambda: clip.image_similarity(before, after),
    }
    needs = {"target": target, "inside": target, "lpips": lpips, "direction": clip, "blip": blip, "borne": blip}
    needs |= {"clip2": clip2} | dict.fromkeys(("clip_caption", "clip_image"), clip)
    for key, measure in measures.items():
        if key == "clip" and clip is None:
            continue
        if all(value is not None for part, value in needs.items() if part in key):
            out[key] = None if after is None else measure()
    return out


SHARE = (0.0, 0.0, 1.0, 1.0)  # pseudo-items of an interval: two wrong and two right (Agresti and Coull 1998)
SHARES_APART = (-1.0, 1.0)  # of a paired difference: one that either side alone has right (Bonett and Price 2012)


class Interval(NamedTuple):
    """A mean with its 95% bootstrap interval."""

    mean: float  # NaN of no item
    low: float  # NaN, as `high`, of fewer than two items
    high: float
    items: int  # that had a value
    missing: int  # values that were None or NaN

    def verdict(self, better: str = "higher") -> str:
        """Of a difference: "wins", "loses", or, where the interval holds 0 or there is none, "ties"."""
        above, below = ("wins", "loses") if better == "higher" else ("loses", "wins")
        return above if self.low > 0 else below if self.high < 0 else "ties"


def bootstrap(
    values_by_item: Values, n: int = 10_000, seed: int = 0, seeds: int = 1, pseudo: tuple[float, ...] = ()
) -> Interval:
    """The mean over items of each item's mean, and its percentile interval from `n` resamplings of items and seeds.

    seeds: how many an item's values are of, seed by seed; each resampling draws items and, for all of them, seeds, both
    with replacement (the pigeonhole bootstrap of Owen 2007, which errs to the wide side where seeds do not matter).
    Values of one item and seed are not independent, so they are drawn together. Missing values are left out of their
    item's mean, an item without any out of the whole: where a failure must count, give it a value.
    pseudo: items of these values that the interval draws from, too, and the mean does not see: `SHARE` for shares,
    whose interval would have no width where all of a few items are right. The percentiles lie as much further out as
    Student's t with so few items does (the expanded percentiles of Hesterberg 2015).
    """
    from scipy import special  # all of SciPy's statistics take longer to import

    rows = [np.array([np.nan if v is None else v for v in values], float) for values in values_by_item.values()]
    missing = sum(int(np.isnan(row).sum()) for row in rows)
    rows = [row.reshape(seeds, -1) for row in rows if not np.isnan(row).all()]
    means = np.array([np.nanmean(row) for row in rows])
    if len(means) < 2:
        return Interval(float(means.mean()) if len(means) else np.nan, np.nan, np.nan, len(means), missing)
    sums = np.array([np.nansum(row, 1) for row in rows])  # (items, seeds)
    counts = np.array([(~np.isnan(row)).sum(1) for row in rows])
    run = counts.any(0).astype(int)  # a seed that no item has a value of has no pseudo-items either
    sums = np.vstack([sums, *(value * run for value in pseudo)])
    counts = np.vstack([counts, *(run for _ in pseudo)])
    drawn = resampled(sums, counts, times_drawn(seeds, n, seed), times_drawn(len(sums), n, seed + 1))
    spare = len(means) - 1
    tail = 100 * special.ndtr(np.sqrt(len(means) / spare) * special.stdtrit(spare, 0.025))
    return Interval(float(means.mean()), *map(float, np.nanpercentile(drawn, (tail, 100 - tail))), len(means), missing)


@lru_cache(maxsize=8)  # a report asks for the same ones hundreds of times
def times_drawn(count: int, n: int, seed: int) -> np.ndarray:
    """How often each of `count` is drawn when as many are drawn with replacement, `n` times over: (n, count) float."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), n).astype(float)


def resampled(sums: np.ndarray, counts: np.ndarray, seeds: np.ndarray, items: np.ndarray) -> np.ndarray:
    """`bootstrap`'s mean in n resamplings, (n,), of the sums and counts, (items, seeds), of each item's values.

    seeds, items: how often each is drawn, (n, seeds) and (n, items). NaN where none of the items drawn has a
    value under the seeds drawn.
    """
    if (counts > 0).all() and counts.shape[1] == 1:
        return items @ (sums / counts)[:, 0] / len(sums)
    of = seeds @ counts.T.astype(float)  # values, (n, items)
    means = np.divide(seeds @ sums.T, of, out=np.zeros(of.shape), where=of > 0)
    items = items * (of > 0)
    total = items.sum(1)
    return np.divide((items * means).sum(1), total, out=np.full(len(total), np.nan), where=total > 0)


def percentiles(statistic: Callable, *samples: np.ndarray, n: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """SciPy's 95% percentile interval of a statistic(*samples, axis) from `n` resamplings, samples drawn in pairs."""
    from scipy import stats

    options = {"n_resamples": n, "method": "percentile", "paired": len(samples) > 1, "vectorized": True}
    found = stats.bootstrap(samples, statistic, **options, rng=np.random.default_rng(seed)).confidence_interval
    return float(found.low), float(found.high)


def paired_bootstrap(
    a_by_item: Values,
    b_by_item: Values,
    n: int = 10_000,
    seed: int = 0,
    seeds: int = 1,
    pseudo: tuple[float, ...] = (),
) -> Interval:
    """`bootstrap` of a - b, value by value (same item, seed and turn); a pair is missing where either value is.

    pseudo: `SHARES_APART` where both are shares.

    Raises BenchError where the two do not hold the same items with as many values.
    """
    if {k: len(v) for k, v in a_by_item.items()} != {k: len(v) for k, v in b_by_item.items()}:
        raise BenchError("two methods can be compared only over the same items, seeds and turns")
    pairs = {item: zip(values, b_by_item[item]) for item, values in a_by_item.items()}
    apart = {k: [None if None in p else float(p[0]) - float(p[1]) for p in v] for k, v in pairs.items()}
    return bootstrap(apart, n, seed, seeds, pseudo)
