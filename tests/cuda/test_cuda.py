"""On a card every path gives what the plain one gives on the CPU, in every dtype, size, editor and thread."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pseudo import error

import emilie_min as emilie
from emilie_min.checkpoint import reading
from emilie_min.checkpoint.networks import meta_networks
from emilie_min.emilie import Editor
from emilie_min.loading import editor_class
from emilie_min.toy import world

PATHS = ("plain", "default", "compiled", "low memory")
GREY_LEVELS = {"float32": 0.1, "float16": 0.5, "bfloat16": 3.0}  # mean difference of pictures after three edits
LATENT = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 2e-1}  # relative error of latents; convolutions may use TF32


def levels(canvas, i: int) -> np.ndarray:
    return np.asarray(canvas.history[i].image, dtype=float)


@pytest.mark.parametrize("dtype", GREY_LEVELS)
@pytest.mark.parametrize("path", PATHS)
def test_three_edits_are_those_of_the_cpu(load, chain, on_the_cpu, device, path, dtype):
    editor = load(path, dtype)
    assert editor.device.type == device and editor.dtype == getattr(torch, dtype)
    assert (type(editor) is Editor) == (path == "plain" or (path, device) == ("default", "cpu"))
    canvas, wanted = chain(editor), on_the_cpu()
    assert torch.equal(canvas.z_init, wanted.z_init)  # noise is drawn on the CPU
    for i in range(3):
        assert canvas.history[i].latent.device.type == "cpu" and canvas.history[i].latent.dtype == torch.float32
        assert np.abs(levels(canvas, i) - levels(wanted, i)).mean() <= GREY_LEVELS[dtype]


@torch.no_grad()
@pytest.mark.parametrize("path", ["plain", "default", "compiled"])
def test_the_original_s_numbers(small_config, small_ckpt, goldens, device, path):
    """The goldens' networks, with convolutions in full float32."""
    networks, device = meta_networks(small_config), torch.device(device)
    reading.load(networks, small_ckpt, device, torch.float32)
    kind = Editor if path == "plain" else editor_class(device, path == "compiled", low_memory=False)
    with torch.backends.cudnn.flags(allow_tf32=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that compiling takes a while
        editor = kind(small_config, **networks, device=device)
        x, z_img = goldens["denoise.1.x"].to(device), goldens["vae.rect.mode"].to(device)
        cond, _, null = editor.text(goldens["text.input_ids"].to(device)).split(1)
        for _ in range(2):  # what is recorded first is replayed then
            denoised = editor.denoise(x, goldens["denoise.1.sigma"].item(), z_img, cond, null, 7.5, 1.5)
            assert error(denoised.cpu(), goldens["denoise.1.cfg"]) <= 1e-4
        assert error(editor.encode(goldens["vae.rect.image"]).cpu(), goldens["vae.rect.mode"]) <= 1e-4
        assert error(editor.decode(goldens["vae.rect.z"]).cpu(), goldens["vae.rect.decoded"]) <= 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_several_sizes_in_one_session(load, chain, on_the_cpu, path):
    """There and back again: what is kept of one size must not be used for another."""
    editor = load(path, "float32")
    first = chain(editor)
    for size in ((96, 64), (64, 96), (64, 64)):
        canvas = chain(editor, size)
        assert canvas.image.size == size
        assert error(canvas.latent, on_the_cpu(size).latent) <= LATENT["float32"], size
    assert error(canvas.latent, first.latent) <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"image_scale": 1.0},
        {"reuse": 2},
        {"sampler": "dpmpp_2m"},
        {"guidance_interval": (0.4, 4.0), "gate": "guidance"},
        {"gate": "eq8", "soft": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", PATHS)
def test_every_way_to_edit(load, chain, on_the_cpu, path, settings):
    canvas, wanted = chain(load(path, "float32"), **settings), on_the_cpu(**settings)
    assert error(canvas.latent, wanted.latent) <= LATENT["float32"]


@pytest.mark.parametrize("path", PATHS)
def test_outside_a_mask_the_latent_stays_to_the_bit(load, half, path):
    canvas = emilie.open(world.render(world.scene(3)), load(path, half), seed=5)
    source = canvas.latent
    for text in ("make it night", "make it day"):
        canvas.edit(text, (0, 0, 32, 64), steps=4)
        assert torch.equal(canvas.latent[..., 8:], source[..., 8:])
        assert not torch.equal(canvas.latent[..., :8], source[..., :8])


@pytest.mark.parametrize("path", PATHS)
def test_the_same_seed_gives_the_same_picture(load, half, path):
    canvas = emilie.open(world.render(world.scene(3)), load(path, half), seed=5)
    once = np.asarray(canvas.edit("make it night", steps=4), dtype=float)
    canvas.edit("make it day", steps=4)
    canvas.branch(0)
    assert np.abs(np.asarray(canvas.edit("make it night", steps=4), dtype=float) - once).max() <= 1


@pytest.mark.parametrize("path", PATHS)
def test_two_editors_take_turns(load, half, path):
    """Two sessions in turn, on editors of two dtypes, are what each is alone."""
    dtypes = ("float32", half)

    def opened(dtype):
        return emilie.open(world.render(world.scene(3)), load(path, dtype), seed=5)

    in_turn, alone = [opened(dtype) for dtype in dtypes], [opened(dtype) for dtype in dtypes]
    for text in ("make it night", "make it day"):
        for canvas in in_turn:
            canvas.edit(text, steps=4)
    for canvas in alone:
        for text in ("make it night", "make it day"):
            canvas.edit(text, steps=4)
    for a, b, dtype in zip(in_turn, alone, dtypes):
        assert error(a.latent, b.latent) <= LATENT[dtype] / 10


@pytest.mark.parametrize("path", PATHS)
def test_another_thread_than_the_one_that_loaded(load, chain, on_the_cpu, path):
    """The studio's worker edits with what the main thread loaded, and may have used."""
    editor = load(path, "float32")
    chain(editor)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            assert error(pool.submit(chain, editor).result().latent, on_the_cpu().latent) <= LATENT["float32"]
    assert error(chain(editor).latent, on_the_cpu().latent) <= LATENT["float32"]  # and back in the first


@pytest.mark.parametrize("path", PATHS)
def test_two_threads_with_an_editor_each(load, chain, on_the_cpu, path):
    editors = [load(path, "float32"), load(path, "float32", again=1)]
    with ThreadPoolExecutor(2) as pool:
        for canvas in pool.map(chain, 2 * editors):
            assert error(canvas.latent, on_the_cpu().latent) <= LATENT["float32"]


@torch.no_grad()
def test_in_low_memory_one_network_at_a_time_is_on_the_card(load, device, half):
    editor, z = load("low memory", half), torch.zeros(1, 4, 16, 16, device=device)
    context = editor.context(["make it night"])
    uses = {
        "text": lambda: editor.context([""]),
        "vae": lambda: editor.decode(z),
        "unet": lambda: editor.branches([z], 1.0, [z], [context]),
    }
    for used, use in uses.items():
        use()
        where = {part: next(getattr(editor, part).parameters()).device.type for part in uses}
        assert where == {part: device if part == used else "cpu" for part in uses}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts a card's memory")
def test_low_memory_needs_less(load, chain):
    peaks = {}
    for path in ("plain", "low memory"):
        editor = load(path, "float32", again=2)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        weights = sum(p.nbytes for n in (editor.unet, editor.vae, editor.text) for p in n.parameters())
        before = torch.cuda.memory_allocated() - (weights if path == "plain" else 0)
        chain(editor)
        peaks[path] = torch.cuda.max_memory_allocated() - before
    assert peaks["low memory"] < peaks["plain"]
