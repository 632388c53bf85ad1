"""The methods that follow instructions: EMILIE is a canvas, the others are InstructPix2Pix from their own pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

import emilie_min as emilie
from emilie_min import sampling
from emilie_min.canvas import images
from emilie_min.errors import CheckpointError, SamplingError
from emilie_min.methods.base import Request
from emilie_min.methods.instruct import Concatenated, Emilie, IterativeInstructPix2Pix

NIGHT, DAY, COMIC = "make it night", "make it day", "turn it into a comic"
SCALES = {"steps": 2, "text_scale": 3.0, "image_scale": 1.5}
SHAPE = (1, 4, 16, 16)


def left_half() -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    return mask


def follow(method, picture, requests):
    """The chain after each request."""
    chains = [method.open(picture, 5)]
    for request in requests:
        chains.append(method.edit(chains[-1], request))
    return chains[1:]


def by_hand(editor, z_img, text, i):
    cond, null = editor.context([text, ""]).split(1)
    z_init, noise = sampling.noise_stream(SHAPE, 5, "init")(), sampling.noise_stream(SHAPE, 5, "edit", i)
    sigmas = sampling.get_sigmas(2, editor.alphas_cumprod)
    return editor.sample(z_img, cond, null, sigmas, z_init, noise, text_scale=3.0, image_scale=1.5)


@pytest.mark.parametrize("settings", [{}, {"gate": "guidance"}, {"iterate": "image"}, {"rescale": "exact"}], ids=str)
def test_emilie_is_a_canvas(editor, picture, settings):
    requests = [Request(NIGHT), Request(DAY, left_half()), Request(COMIC, left_half())]
    chains = follow(Emilie(editor, **SCALES, **settings), picture, requests)
    canvas = emilie.open(picture, editor, seed=5)
    for chain, request in zip(chains, requests):
        image = canvas.edit(request.instruction, request.mask, **SCALES, **settings)
        assert torch.equal(chain.latent, canvas.latent) and chain.image.tobytes() == image.tobytes()
        assert chain.notes == {"f": canvas.state.f} and chain.mask == canvas.state.mask
    assert chains[-1].requests == tuple(requests)


def test_emilie_without_its_masks_and_with_its_background(editor, picture):
    free, unmasked, kept = (
        follow(Emilie(editor, **SCALES, **more), picture, [Request(NIGHT, mask)])[0]
        for more, mask in (({}, None), ({"masks": False}, left_half()), ({"keep_background": True}, left_half()))
    )
    assert torch.equal(free.latent, unmasked.latent) and unmasked.mask is None
    assert (np.asarray(kept.image)[:, 32:] == np.asarray(picture)[:, 32:]).all() and kept.image != picture


@pytest.mark.parametrize("pixels", ["truncate", "round", "float"])
def test_iterated_instructpix2pix_starts_from_the_picture_before(editor, picture, pixels):
    method = IterativeInstructPix2Pix(editor, pixels=pixels, **SCALES)
    chains = follow(method, picture, [Request(NIGHT), Request(DAY, left_half())])  # a mask is not looked at
    seen, latent = picture, None
    for i, (chain, text) in enumerate(zip(chains, (NIGHT, DAY))):
        z_img = images.to_latent(editor, seen)
        if pixels == "float" and i:
            z_img = editor.encode(editor.decode(latent))
        latent = by_hand(editor, z_img, text, i)
        seen = images.from_latent(editor, latent, truncate=pixels == "truncate")
        assert torch.equal(chain.latent, latent) and chain.image.tobytes() == seen.tobytes() and chain.mask is None


def test_concatenated_says_all_so_far_on_the_opened_picture(editor, picture):
    chains = follow(Concatenated(editor, separator=". ", **SCALES), picture, [Request(NIGHT), Request(DAY)])
    z_img = images.to_latent(editor, picture)
    for i, text in enumerate((NIGHT, f"{NIGHT}. {DAY}")):
        assert torch.equal(chains[i].latent, by_hand(editor, z_img, text, i))
    assert [chain.notes for chain in chains] == [{"tokens": 3 + 2}, {"tokens": 6 + 2}]
    (long,) = follow(Concatenated(editor, steps=1), picture, [Request(" ".join(30 * [NIGHT]))])
    assert long.notes == {"tokens": 77}  # the rest was cut


def test_settings_and_models_that_cannot_be_used_are_refused_before_any_edit(editor):
    for method, wrong in (
        *((Emilie, wrong) for wrong in ({"gate": "wall"}, {"steps": 0}, {"sigma_low": 5.0, "sigma_high": 1.0})),
        *((method, {"pixels": "none"}) for method in (IterativeInstructPix2Pix, Concatenated)),
        (Concatenated, {"text_scale": float("nan")}),
    ):
        with pytest.raises(SamplingError):
            method(editor, **wrong)
    captions = emilie.load("random", "toy-t2i", device="cpu")
    for method in (Emilie, IterativeInstructPix2Pix, Concatenated):
        with pytest.raises(CheckpointError):
            method(captions)


def test_anchor_leads_back_to_the_picture_before_and_not_to_the_opened_one(editor, picture):
    """Else every masked edit would undo the earlier ones outside its mask."""
    first, second = follow(Emilie(editor, **SCALES), picture, [Request(NIGHT), Request(COMIC, left_half())])
    opened = editor.scale_factor * images.to_latent(editor, picture)
    assert torch.equal(second.latent[..., 8:], first.latent[..., 8:])
    assert not torch.equal(first.latent[..., 8:], opened[..., 8:])


def test_the_pictures_between_are_truncated_and_instructions_joined_by_a_comma_unless_told_otherwise(editor, picture):
    requests = [Request(NIGHT), Request(DAY)]
    for method, settings in ((IterativeInstructPix2Pix, {"pixels": "truncate"}), (Concatenated, {"separator": ", "})):
        plain, told = (follow(method(editor, **SCALES, **s), picture, requests) for s in ({}, settings))
        assert [c.image.tobytes() for c in plain] == [c.image.tobytes() for c in told]
    truncated = images.from_latent(editor, told[-1].latent, truncate=True)
    assert truncated.tobytes() == told[-1].image.tobytes()


def test_a_comma_joins_instructions_in_what_the_model_is_told(editor, picture, monkeypatch):
    told, tokenize = [], editor.text.tokenize  # the small model's words leave punctuation out, CLIP's do not
    monkeypatch.setattr(editor.text, "tokenize", lambda texts, **more: told.append(texts[0]) or tokenize(texts, **more))
    follow(Concatenated(editor, **SCALES), picture, [Request(NIGHT), Request(DAY)])
    assert told == [NIGHT, f"{NIGHT}, {DAY}"]


def test_emilie_is_asked_for_nothing_only_by_a_benchmark(editor, picture):
    (chain,) = follow(Emilie(editor, **SCALES), picture, [Request("")])
    canvas = emilie.open(picture, editor, seed=5)
    assert canvas.edit("", allow_empty=True, **SCALES).tobytes() == chain.image.tobytes()
