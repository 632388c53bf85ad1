"""The remedies against drift, and the controls that change nothing."""

import numpy as np
import pytest
import torch

from emilie_min.canvas import images
from emilie_min.errors import SamplingError
from emilie_min.methods.base import Request
from emilie_min.methods.controls import Autoencoder, Untouched
from emilie_min.methods.instruct import IterativeInstructPix2Pix
from emilie_min.methods.remedies import LowPass, PasteBack, smooth

SETTINGS = {"steps": 2, "text_scale": 3.0, "image_scale": 1.5}
REQUESTS = [Request("make it night"), Request("make it day"), Request("")]


def follow(method, picture, requests=REQUESTS):
    chains = [method.open(picture, 5)]
    for request in requests:
        chains.append(method.edit(chains[-1], request))
    return chains


def test_the_controls(editor, picture):
    still = follow(Untouched(editor), picture)
    assert all(chain.image.tobytes() == picture.tobytes() for chain in still) and len(still[-1].requests) == 3
    coded = follow(Autoencoder(editor), picture)
    for before, after in zip(coded, coded[1:]):
        z = editor.scale_factor * images.to_latent(editor, before.image)
        assert after.image.tobytes() == images.from_latent(editor, z).tobytes() and after.latent is None


def test_what_hardly_changed_is_put_back(editor, picture):
    free, back = (method(editor, **SETTINGS).edit for method in (IterativeInstructPix2Pix, PasteBack))
    start = PasteBack(editor).open(picture, 5)
    a, b, old = (np.asarray(c.image).astype(int) for c in (free(start, REQUESTS[0]), back(start, REQUESTS[0]), start))
    far = abs(a - old).max(-1) >= 24
    near = np.zeros_like(far)
    for y, x in zip(*np.nonzero(far)):
        near[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = True
    assert (b[near] == a[near]).all() and (b[~near] == old[~near]).all()
    nothing, everything = (PasteBack(editor, threshold=t, grow=g, **SETTINGS) for t, g in ((255, 0), (0, 0)))
    assert nothing.edit(start, REQUESTS[0]).image.tobytes() == picture.tobytes()
    assert everything.edit(start, REQUESTS[0]).image.tobytes() == free(start, REQUESTS[0]).image.tobytes()


def test_low_frequencies_keep_the_mean_and_deviation_of_the_turns_before(editor, picture, monkeypatch):
    seen = []
    sample = editor.sample
    monkeypatch.setattr(editor, "sample", lambda z, *args, **more: seen.append(z) or sample(z, *args, **more))
    chains = follow(LowPass(editor, keep=1.0, width=3, **SETTINGS), picture)
    first = images.to_latent(editor, picture)
    assert torch.allclose(seen[0], first, atol=1e-5)  # the first turn has none before it
    low, then = smooth(first, 3), images.to_latent(editor, chains[1].image)
    aligned = seen[1] - (then - smooth(then, 3))  # what is left of it is its low frequencies
    for statistic in (torch.mean, torch.std):
        assert torch.allclose(statistic(aligned, (2, 3)), statistic(low, (2, 3)), atol=1e-4)
        assert not torch.allclose(statistic(smooth(then, 3), (2, 3)), statistic(low, (2, 3)), atol=1e-4)
    kept = torch.tensor(chains[-1].notes["low"])
    assert torch.allclose(kept[0], low.mean((2, 3))[0], atol=1e-5)  # keep=1: the first turn's for good
    moved = follow(LowPass(editor, keep=0.5, width=3, **SETTINGS), picture, REQUESTS[:2])[-1].notes["low"]
    assert not torch.allclose(torch.tensor(moved), kept)


def test_smoothing_keeps_what_is_flat():
    assert torch.allclose(smooth(torch.full((1, 4, 8, 8), 3.0), 5), torch.tensor(3.0))


@pytest.mark.parametrize(
    "method, wrong",
    [(PasteBack, {"pixels": "float"}), (PasteBack, {"threshold": 300}), (PasteBack, {"grow": -1}),
     (LowPass, {"width": 4}), (LowPass, {"keep": 1.5}), (LowPass, {"keep": -0.1}), (LowPass, {"pixels": "float"})],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(editor, method, wrong):
    with pytest.raises(SamplingError):
        method(editor, **wrong)
