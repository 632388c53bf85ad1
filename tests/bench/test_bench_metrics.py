"""Metrics against closed forms, the small world's truth, and tiny random CLIP and BLIP models computed by hand."""

import shutil
import socket
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from emilie_min.bench import metrics
from emilie_min.bench.data import Turn
from emilie_min.bench.metrics import (
    METRICS,
    SHARE,
    SHARES_APART,
    BlipScorer,
    ClipScorer,
    Edit,
    LpipsScorer,
    Scorers,
    bootstrap,
    l1,
    measure_turn,
    paired_bootstrap,
    psnr,
    ssim,
    world_verdict,
)
from emilie_min.errors import BenchError, EmilieError, ImageError, MaskError
from emilie_min.toy import judge, world
from emilie_min.toy.judge import psnr as toy_psnr
from emilie_min.toy.world import Object, Scene


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every attempt to reach the network fails, and is counted."""
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return calls


def noise(*seed, size=64, n=None):
    """A random picture, or a list of n."""
    pictures = np.random.default_rng(seed).integers(0, 256, (n or 1, size, size, 3), dtype=np.uint8)
    return pictures[0] if n is None else list(pictures)


def box(x0, y0, x1, y1, size=64):
    mask = np.zeros((size, size), np.uint8)
    mask[y0:y1, x0:x1] = 255
    return mask


# ---- pictures


def test_psnr_and_l1_of_pictures_that_differ_by_a_known_amount():
    a = np.full((40, 30, 3), 100, np.uint8)
    b = a + np.uint8(10)
    assert psnr(a, b) == pytest.approx(20 * np.log10(25.5)) and l1(a, b) == pytest.approx(10)
    b = a.copy()
    b[:10, :, 0] = 140  # a quarter of one channel of three
    assert l1(a, b) == pytest.approx(40 / 12) and psnr(a, b) == pytest.approx(10 * np.log10(255**2 / (1600 / 12)))
    assert psnr(Image.fromarray(a), Image.fromarray(b)) == psnr(a, b) == psnr(b, a)


def test_differences_do_not_wrap_around_in_eight_bits():
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert l1(black, white) == l1(white, black) == 255 and psnr(black, white) == 0


def test_psnr_agrees_with_the_judges_and_is_capped_for_identical_pictures():
    a, b = noise(0), noise(1)
    assert psnr(a, b) == pytest.approx(toy_psnr(a, b))
    assert psnr(a, a) == metrics.PSNR_CAP == 100 and l1(a, a) == 0 and ssim(a, a) == 1
    big = noise(0, size=512)
    one = big.copy()
    one[0, 0, 0] ^= 1
    assert 10 * np.log10(255**2 * big.size) > 100 and psnr(big, one) == 100  # never above what identical pictures get


@pytest.mark.parametrize("measure", [psnr, l1, ssim])
def test_what_lies_under_a_mask_changes_nothing(measure):
    a, b, mask = noise(0), noise(1), box(20, 24, 44, 48)
    inside = b.copy()
    inside[mask > 0] = noise(2)[mask > 0]
    assert measure(a, b, mask) == measure(a, inside, mask) == measure(a, b, Image.fromarray(mask))
    assert measure(a, b, mask) == measure(a, b, mask > 0) != measure(a, b)
    for y, x in (24, 19), (48, 30), (23, 20):  # pixels that touch the mask from outside do count
        outside = b.copy()
        outside[y, x] = 255 - outside[y, x]
        assert measure(a, outside, mask) != measure(a, b, mask)
    assert measure(a, b, np.zeros_like(mask)) == measure(a, b)
    assert measure(a, b, np.full_like(mask, 255)) is None
    assert measure(a, a, mask) == {psnr: 100, l1: 0, ssim: 1}[measure]


def test_masked_psnr_and_l1_by_hand():
    a, b, mask = noise(0), noise(1), box(0, 0, 64, 16)
    d = a[16:].astype(float) - b[16:]
    assert l1(a, b, mask) == pytest.approx(abs(d).mean())
    assert psnr(a, b, mask) == pytest.approx(10 * np.log10(255**2 / (d**2).mean()))


def test_a_mask_is_white_from_middle_grey_on():
    a, b = noise(0), noise(1)
    grey = np.full((64, 64), 127, np.uint8)
    grey[:32] = 128
    assert l1(a, b, grey) == l1(a, b, box(0, 0, 64, 32))


def by_hand_ssim(a, b, mask):
    """Wang et al.'s formula at every whole window that the mask leaves alone."""
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            if not mask[y : y + 11, x : x + 11].any():
                for c in range(3):
                    p, q = (v[y : y + 11, x : x + 11, c].astype(float) for v in (a, b))
                    mp, mq = (w * p).sum(), (w * q).sum()
                    vp, vq, vpq = (w * p * p).sum() - mp**2, (w * q * q).sum() - mq**2, (w * p * q).sum() - mp * mq
                    values.append((2 * mp * mq + c1) * (2 * vpq + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_ssim_is_wangs_outside_the_mask():
    from skimage.metrics import structural_similarity

    a = noise(0, size=32)
    b = (a * 0.7 + noise(1, size=32) * 0.3).astype(np.uint8)
    mask = box(0, 0, 9, 14, size=32)
    assert ssim(a, b, mask) == pytest.approx(by_hand_ssim(a, b, mask), abs=1e-9)
    plain = structural_similarity(
        a, b, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(a, b) == pytest.approx(plain, abs=1e-12) == pytest.approx(by_hand_ssim(a, b, mask * 0), abs=1e-9)


def test_pictures_and_masks_that_do_not_fit_are_refused():
    a = noise(0)
    for measure in (psnr, l1, ssim):
        with pytest.raises(ImageError, match="64x64 and 32x32 px: make them one size"):
            measure(a, noise(0, size=32))
        with pytest.raises(MaskError, match="give uint8 or bool"):
            measure(a, a, np.zeros((32, 32), np.uint8))
    with pytest.raises(MaskError, match="float64"):
        psnr(a, a, np.zeros((64, 64)))
    for bad in (a / 255, a[..., 0], np.dstack([a, a[..., 0]]), "picture.png"):
        with pytest.raises(ImageError, match="uint8 array"):
            psnr(a, bad)
    with pytest.raises(ImageError, match="11 px a side"):
        ssim(noise(0, size=10), noise(1, size=10))


# ---- LPIPS, by a package that tests do not have


def test_lpips_is_asked_for_or_not_imported():
    with pytest.raises(BenchError, match="pip install lpips"):
        LpipsScorer()
    assert not {"lpips", "torchvision"} & set(sys.modules)


def test_what_scores_lack_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda **_: 1 / 0))
    with pytest.raises(BenchError, match="LPIPS cannot be loaded, go online once"):
        LpipsScorer()
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(BenchError, match="PSNR and SSIM need scikit-image"):
        psnr(noise(0), noise(1))


def test_lpips_sees_the_same_pixels_under_the_mask(monkeypatch):
    class LPIPS(torch.nn.Module):
        """Spreads what it sees by 2 px, as a network does."""

        def __init__(self, net, spatial, verbose):
            super().__init__()
            assert (net, spatial, verbose) == ("alex", True, False)

        def forward(self, x, y):
            assert x.shape == y.shape == (1, 3, 64, 64) and -1 <= x.min() < -0.9 and 0.9 < x.max() <= 1
            return torch.nn.functional.avg_pool2d((x - y).abs().mean(1, keepdim=True), 5, 1, 2)

    module = ModuleType("lpips")
    module.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    score, a, b, mask = LpipsScorer().lpips_distance, noise(0), noise(1), box(0, 0, 32, 64)
    other = b.copy()
    other[mask > 0] = noise(2)[mask > 0]
    assert score(a, b, mask) == score(a, other, mask) > 0 and score(a, a) == 0
    only = np.where(mask[..., None] > 0, a, b)
    expected = torch.from_numpy(np.abs(a.astype(float) - only).mean(-1) / 127.5)[None, None]
    expected = torch.nn.functional.avg_pool2d(expected, 5, 1, 2)[0, 0, :, 32:].mean()
    assert score(a, b, mask) == pytest.approx(float(expected), rel=1e-5)
    assert score(a, b, mask * 0 + 255) is None


# ---- the small world's truth


START = Scene("sand", "day", (Object("circle", "red", "top left", 1, -1), Object("star", "blue", "bottom right")))


def edited(scene, place, **changes):
    """The scene with the thing at a place changed, added (whole) or, without changes, removed."""
    objects = {o.place: o for o in scene.objects}
    old = objects.pop(place, None)
    new = [replace(old, **changes) if old else Object(place=place, **changes)] if changes else []
    return replace(scene, objects=(*objects.values(), *new))


def chain(*steps):
    """START and what becomes of it: each step is a place with its changes, or a change of ground or look."""
    truths = [START]
    for place, changes in steps:
        truths.append(edited(truths[-1], place, **changes) if place else replace(truths[-1], **changes))
    return truths


GREEN = ("top left", {"colour": "green"})
SQUARE = ("top left", {"shape": "square"})
CROSS = ("top right", {"shape": "cross", "colour": "pink"})


def test_a_right_chain_is_right_at_every_turn():
    for seed in range(5):
        first, steps = world.chain(seed, 4)
        truths = [first, *(after for _, after, _ in steps)]
        for turn in range(1, 5):
            before, after = world.render(truths[turn - 1]), world.pixels(truths[turn])
            verdict = world_verdict(after, truths[: turn + 1], before)
            assert verdict.pop("lost") in (0, None)
            assert verdict == {"correct": True, "edited": True, "kept": True, "retained": 1}


def test_a_lost_earlier_edit_is_counted():
    truths = chain(GREEN, CROSS, (None, {"background": "grass"}))
    before = world.pixels(truths[2])
    forgot = world.pixels(edited(truths[3], "top left", colour="red"))  # the first edit is undone
    verdict = world_verdict(forgot, truths, before)
    assert verdict == {"correct": False, "edited": True, "kept": False, "retained": pytest.approx(2 / 3), "lost": 0.5}
    early = world_verdict(world.pixels(truths[2]), truths, world.pixels(truths[3]))  # shown before it was asked for
    assert (early["retained"], early["lost"]) == (pytest.approx(2 / 3), 0)
    assert world_verdict(forgot, truths)["lost"] is None  # nothing is known of what showed before
    never = world_verdict(forgot, truths, world.pixels(edited(truths[2], "top left", colour="red")))
    assert never["retained"] == pytest.approx(2 / 3) and never["lost"] == 0  # never made, so not lost
    assert world_verdict(world.pixels(START), truths, world.pixels(START)) == {
        **dict.fromkeys(("correct", "edited"), False), "kept": False, "retained": 0, "lost": None
    }  # fmt: skip


def test_an_overwritten_edit_is_not_asked_for_any_more():
    truths = chain(GREEN, ("top left", {"colour": "pink"}))
    right = world.pixels(truths[2])
    assert world_verdict(right, truths, world.pixels(truths[1])) == {
        **dict.fromkeys(("correct", "edited", "kept"), True), "retained": 1, "lost": None
    }  # fmt: skip
    assert world_verdict(world.pixels(truths[1]), truths)["retained"] == 0  # one turn stands, and it does not show
    gone = chain(GREEN, ("top left", {}))
    assert world_verdict(world.pixels(gone[2]), gone)["retained"] == 1
    assert world_verdict(world.pixels(gone[1]), gone)["retained"] == 0


def test_what_a_later_edit_of_the_same_thing_leaves_standing_still_counts():
    truths = chain(GREEN, SQUARE)
    red_square = edited(truths[2], "top left", colour="red")
    verdict = world_verdict(world.pixels(red_square), truths, world.pixels(truths[1]))
    assert (verdict["retained"], verdict["lost"]) == (0.5, 1)  # the shape is there, the colour is gone
    added = chain(CROSS, ("top right", {"colour": "yellow"}))
    star = edited(added[2], "top right", shape="star")
    assert world_verdict(world.pixels(star), added, world.pixels(added[1]))["retained"] == 0.5


def test_a_change_that_is_taken_back_belongs_to_the_turn_that_took_it_back():
    truths = chain((None, {"style": "night"}), CROSS, (None, {"style": "day"}))
    assert world_verdict(world.pixels(truths[3]), truths, world.pixels(truths[2]))["lost"] == 0
    night = world_verdict(world.pixels(truths[2]), truths, world.pixels(truths[2]))
    assert (night["retained"], night["lost"]) == (0.5, 0)
    again = chain((None, {"style": "night"}), CROSS, (None, {"style": "day"}), (None, {"style": "night"}))
    assert world_verdict(world.pixels(again[3]), again)["retained"] == 0.5  # the first night is not asked for twice
    idle = chain((None, {}), (None, {}))  # drift: nothing is ever asked for
    assert world_verdict(world.pixels(START), idle, world.pixels(START)) == {
        **dict.fromkeys(("correct", "edited", "kept"), True), "retained": None, "lost": None
    }  # fmt: skip


def test_a_spoilt_rest_is_not_kept_and_a_thing_out_of_position_does_not_show():
    truths = chain(GREEN)
    spoilt = edited(truths[1], "bottom right", colour="yellow")
    verdict = world_verdict(world.pixels(spoilt), truths)
    assert verdict["edited"] and not verdict["kept"] and not verdict["correct"] and verdict["retained"] == 1
    for dx, shows in (-1, 1), (-2, 0):  # it belongs at +1, and may be off by 2
        moved = world.pixels(edited(truths[1], "top left", dx=dx))
        assert world_verdict(moved, truths)["retained"] == shows


def test_a_picture_of_another_size_is_refused_and_none_is_wrong():
    truths = chain(GREEN, CROSS)
    with pytest.raises(ImageError, match="64x64 px"):
        world_verdict(noise(0, size=128), truths)
    with pytest.raises(ImageError, match="64x64 px"):
        world_verdict(noise(0), truths, before=Image.new("RGB", (64, 32)))
    assert world_verdict(None, truths) == {
        **dict.fromkeys(("correct", "edited", "kept"), False), "retained": 0, "lost": None
    }  # fmt: skip


# ---- CLIP and BLIP

SIDES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = {**SIDES, "image_size": 32, "patch_size": 8}
WORDS = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *"abcdefghijklmnopqrst", "[DEC]"]
LIMIT = 40  # tokens


def randomise(model, seed):
    """Weights large enough for different inputs to give different answers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.1)
        parameter.data = torch.ones_like(noise) if "norm" in name.lower() and name.endswith("weight") else noise
    return model.eval()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    units = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 323 + 1))][:256]
    vocab = [*units, *(u + "</w>" for u in units), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[]).save_pretrained(folder)
    ids = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = {**SIDES, **ids, "max_position_embeddings": LIMIT}
    randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=EYES, projection_dim=12)), 0).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

    folder = tmp_path_factory.mktemp("blip")
    BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(folder)
    ids = {"vocab_size": len(WORDS), "bos_token_id": len(WORDS) - 1, "eos_token_id": 2, "sep_token_id": 3}
    text = {**SIDES, **ids, "pad_token_id": 0, "encoder_hidden_size": 16, "max_position_embeddings": 40}
    config = BlipConfig(text_config=text, vision_config=EYES, projection_dim=12)
    randomise(BlipForConditionalGeneration(config), 2).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return ClipScorer(clip_folder)


@pytest.fixture(scope="module")
def blip(clip, blip_folder):
    return BlipScorer(clip, blip_folder)


def by_hand_pixels(picture, crop):
    """CLIP's preprocessing, step by step: (1, 3, 32, 32)."""
    image = Image.fromarray(picture)
    w, h = image.size
    image = image.resize((32 * w // min(w, h), 32 * h // min(w, h)) if crop else (32, 32), Image.Resampling.BICUBIC)
    left, top = (image.width - 32) // 2, (image.height - 32) // 2
    x = np.asarray(image.crop((left, top, left + 32, top + 32)), float) / 255
    x = (x - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(x).permute(2, 0, 1)[None].float()


def by_hand_image(model, picture):
    with torch.no_grad():
        hidden = model.vision_model(pixel_values=by_hand_pixels(picture, crop=True)).last_hidden_state
        v = (model.vision_model.post_layernorm(hidden[:, 0]) @ model.visual_projection.weight.T)[0].double().numpy()
    return v / np.sqrt((v**2).sum())


def by_hand_text(model, text):
    """One text by itself, unpadded, in units that end a word or do not."""
    units = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 323 + 1))][:256]
    ids = [units.index(c) + 256 * (i == len(word) - 1) for word in text.split() for i, c in enumerate(word)]
    ids = torch.tensor([[512, *ids, 513]])
    with torch.no_grad():
        hidden = model.text_model(input_ids=ids).last_hidden_state
        v = (hidden[:, -1] @ model.text_projection.weight.T)[0].double().numpy()
    return v / np.sqrt((v**2).sum())


def test_clip_embeddings_are_the_submodules_own_and_of_unit_length(clip):
    pictures = [*noise(0, n=2), noise(3, size=40), np.ascontiguousarray(noise(4)[:32])]  # the last is cropped
    texts = ["make it night", "a", "remove the red star"]
    x, t = clip.image(pictures), clip.text(texts)
    assert x.shape == (4, 12) and t.shape == (3, 12) and x.dtype == t.dtype == torch.float32
    assert not x.requires_grad and torch.allclose(torch.cat([x, t]).norm(dim=1), torch.ones(7), atol=1e-6)
    for v, picture in zip(x, pictures):
        assert np.allclose(v, by_hand_image(clip.model, picture), atol=1e-5)
    for v, text in zip(t, texts):
        assert np.allclose(v, by_hand_text(clip.model, text), atol=1e-5)
    apart = torch.pdist(torch.cat([x, t]))
    assert apart.min() > 0.01  # the test can tell them apart


def test_scores_are_the_cosines_that_they_are_named_for(clip):
    a, b = noise(0, n=2)
    x0, x1 = (by_hand_image(clip.model, p) for p in (a, b))
    t, t0, t1 = (by_hand_text(clip.model, text) for text in ("make it night", "a red star", "a blue star"))
    assert clip.clip_score(b, "make it night") == pytest.approx(x1 @ t, abs=1e-5)
    assert clip.image_similarity(a, b) == pytest.approx(x0 @ x1, abs=1e-5)
    dx, dt = x1 - x0, t1 - t0
    direction = dx @ dt / np.sqrt((dx @ dx) * (dt @ dt))
    assert abs(direction) > 0.01
    assert clip.direction_similarity(a, b, "a red star", "a blue star") == pytest.approx(direction, abs=1e-4)
    assert clip.direction_similarity(b, a, "a red star", "a blue star") == pytest.approx(-direction, abs=1e-4)
    assert clip.direction_similarity(a, a.copy(), "a red star", "a blue star") == 0  # not the direction of rounding
    assert clip.direction_similarity(a, b, "a red star", "a red star") == 0


def test_neither_order_nor_batch_changes_an_embedding(clip_folder, clip):
    pictures, texts = noise(5, n=metrics.BATCH + 3), [f"make it {'very ' * (i % 3)}{i}" for i in range(20)]
    whole, fresh = clip.image(pictures), ClipScorer(clip_folder)
    assert torch.allclose(fresh.image(pictures[::-1]).flip(0), whole, atol=1e-5)
    assert torch.allclose(torch.cat([ClipScorer.image(fresh, [p]) for p in pictures]), whole, atol=1e-5)
    assert torch.allclose(fresh.text(texts[::-1]).flip(0), clip.text(texts), atol=1e-5)
    for i in (0, 1, 2):  # padded in a batch or alone
        assert np.allclose(clip.text(texts)[i], by_hand_text(clip.model, texts[i]), atol=1e-5)
    assert torch.equal(clip.text(["a", "b", "a"])[0], clip.text(["a", "b", "a"])[2])


def test_what_is_known_is_not_computed_again(clip_folder, monkeypatch):
    clip = ClipScorer(clip_folder)
    a, b = noise(0, n=2)
    once = clip.image([a, b, a])
    monkeypatch.setattr(clip.model, "get_image_features", lambda **_: pytest.fail("computed again"))
    assert torch.equal(clip.image([Image.fromarray(b), a]), once[[1, 0]])
    with pytest.raises(pytest.fail.Exception):
        clip.image([np.ascontiguousarray(a.reshape(32, 128, 3))])  # the same bytes in another shape


def test_the_end_of_a_long_text_is_cut_with_a_warning(clip, recwarn):
    fits = "abcdef " * 6 + "ab"  # 38 units and two marks
    assert np.allclose(clip.text([fits])[0], by_hand_text(clip.model, fits), atol=1e-5) and not recwarn.list
    with pytest.warns(UserWarning, match=f'reads {LIMIT} tokens: the end of "abcdef .* is cut'):
        long = clip.text([fits + " and more", fits])
    assert torch.allclose(long[0], clip.text([fits])[0], atol=1e-5)


def test_captions_are_greedy_and_their_score_is_textual(clip, blip):
    pictures = [noise(6, i, size=2).repeat(32, 0).repeat(32, 1) for i in range(3)]
    captions, lengths, model = blip.captions(pictures), [], blip.model
    for picture, caption in zip(pictures, captions):
        ids = [len(WORDS) - 1]
        with torch.no_grad():
            seen = model.vision_model(pixel_values=by_hand_pixels(picture, crop=False)).last_hidden_state
            while len(ids) < 31 and ids[-1] != 3:
                out = model.text_decoder(input_ids=torch.tensor([ids]), encoder_hidden_states=seen, is_decoder=True)
                ids.append(int(out.logits[0, -1].argmax()))
        lengths.append(len(ids))
        assert caption == " ".join(WORDS[i] for i in ids[1:] if i > 4)
        expected = by_hand_text(clip.model, caption) @ by_hand_text(clip.model, "make it night")
        assert blip.blip_score(picture, "make it night") == pytest.approx(expected, abs=1e-5)
    assert len(set(captions)) == 3 and min(lengths) < max(lengths) == 31  # some end by themselves
    assert blip.captions(pictures[::-1]) == captions[::-1] and blip.captions(pictures[1:2]) == captions[1:2]
    assert blip.captions(pictures * 7) == captions * 7  # more than a batch


def test_a_caption_that_repeats_the_instruction_scores_one(blip, monkeypatch):
    monkeypatch.setattr(blip, "captions", lambda images: ["make it night"])
    assert blip.blip_score(noise(0), "make it night") == pytest.approx(1, abs=1e-6)
    assert blip.blip_score(noise(0), "a red star") < 0.999


def test_a_local_folder_never_touches_the_network(clip_folder, blip_folder, no_network, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    clip = ClipScorer(str(clip_folder))
    clip.clip_score(noise(0), "make it night")
    BlipScorer(clip, blip_folder).captions([noise(0)])
    assert no_network == []


def test_a_checkpoint_in_half_precision_is_computed_in_single(clip_folder, clip, tmp_path):
    from transformers import CLIPModel

    half, a = shutil.copytree(clip_folder, tmp_path / "half"), noise(0)
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(half)
    assert torch.allclose(ClipScorer(half).image([a]), clip.image([a]), atol=0.01)
    assert ClipScorer(half).text(["a"]).dtype == torch.float32


def test_the_hubs_cache_is_enough(clip_folder, no_network, monkeypatch, tmp_path, clip):
    snapshot = tmp_path / "models--nobody--tiny" / "snapshots" / "abc"
    shutil.copytree(clip_folder, snapshot)
    (tmp_path / "models--nobody--tiny" / "refs").mkdir()
    (tmp_path / "models--nobody--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch.allclose(ClipScorer("nobody/tiny").text(["a"]), clip.text(["a"]), atol=1e-5) and no_network == []


def test_a_model_that_cannot_be_had_is_one_line(clip_folder, blip_folder, no_network, monkeypatch, tmp_path):
    with pytest.raises(BenchError, match="./clip is neither a folder nor"):
        ClipScorer("./clip")
    with pytest.raises(EmilieError, match="device cuda:99 cannot be used here"):
        ClipScorer(clip_folder, "cuda:99")
    with pytest.raises(BenchError, match="does not hold a CLIPModel"):
        ClipScorer(tmp_path)
    assert not metrics.is_blip2(tmp_path)
    with pytest.raises(BenchError, match="CLIPModel"):
        ClipScorer(blip_folder)
    half = shutil.copytree(clip_folder, tmp_path / "half")
    from safetensors.torch import load_file, save_file

    tensors = load_file(half / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "visual_proj" not in k}, half / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(BenchError, match="lacks 1 tensors, such as visual_projection.weight") as error:
        ClipScorer(half)  # it would be filled with random numbers
    assert "\n" not in str(error.value) and no_network == []
    tensors["visual_projection.weight"][0, 0] = float("nan")
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(BenchError, match="half is damaged: visual_projection.weight is not finite"):
        ClipScorer(half)
    for name, message in ("tokenizer.json", "lacks its tokenizer"), ("preprocessor_config.json", "copy all its files"):
        whole = shutil.copytree(clip_folder, tmp_path / name)
        (whole / name).unlink()
        with pytest.raises(BenchError, match=message):
            ClipScorer(whole)


def test_a_hubs_name_without_network_is_one_line(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
    with pytest.raises(BenchError, match="nobody/nothing is neither a folder nor in the hub's cache.*go online") as e:
        ClipScorer("nobody/nothing")
    assert "\n" not in str(e.value)


# ---- one turn


def turns_of(regions=(None,), truths=(None, None), texts=("x",), captions=(None, None), target=None):
    """As many turns as regions; the last has the text, caption and target."""
    rest = len(regions) - 1
    turns = [Turn("before", region=region, truth=truth) for region, truth in zip(regions[:rest], truths[1:])]
    turns.append(Turn(texts[-1], None, captions[1], regions[-1], target, truths[-1]))
    if rest:
        turns[-2] = replace(turns[-2], caption=captions[0])
    return turns


def test_a_turn_is_measured_against_each_of_its_pictures(clip, blip):
    truths = chain(GREEN, CROSS)
    first, before, after = (world.pixels(truth) for truth in truths)
    after = after.copy()
    after[40, 8] ^= 4  # bottom left
    before = before.copy()
    before[50, 8] ^= 64
    masks = [world.mask("top left"), world.mask("top right")]
    captions = "a red star", "a blue star"
    turns = turns_of(masks, truths, ["make it night"], captions)
    scorers = Scorers(clip, blip, clip2=clip)
    out = measure_turn(Edit(before, after, first, turns, "at first", START), scorers)
    assert list(out) == [key for key in METRICS if key != "lpips_outside"]
    assert out["clip2"] == out["clip"] and out["clip_caption"] == clip.clip_score(after, "a blue star")
    assert out["borne_out"] is False  # BLIP's words are none of the world's here
    assert out["correct"] and out["edited"] and out["kept"] and out["retained"] == 1 and out["lost"] == 0
    assert out["l1_outside"] == l1(before, after, masks[1]) == pytest.approx((4 + 64) / 3072)
    assert out["psnr_outside"] == psnr(before, after, masks[1]) and out["ssim_outside"] == ssim(before, after, masks[1])
    both = np.maximum(*map(np.asarray, masks))
    assert out["l1_first"] == l1(first, after, both) == pytest.approx(4 / 2048)
    assert out["psnr_first"] == psnr(first, after, both) and out["l1_target"] == pytest.approx(4 / 4096)
    assert out["psnr_target"] == psnr(world.render(truths[2]), after)
    assert out["clip"] == clip.clip_score(after, "make it night")
    assert out["clip_image"] == clip.image_similarity(before, after)
    assert out["direction"] == clip.direction_similarity(before, after, *captions)
    assert out["blip"] == blip.blip_score(after, "make it night")
    masked = [replace(turn, region=None, mask=turn.region) for turn in turns]  # without a region the mask counts
    assert measure_turn(Edit(before, after, first, masked, "at first", START), scorers) == out


def test_keys_are_absent_without_their_means_and_none_where_nothing_lies_outside(clip):
    a, b, c = noise(7, n=3)
    plain = {"psnr_outside", "ssim_outside", "l1_outside", "psnr_first", "l1_first"}
    assert measure_turn(Edit(a, b, a, turns_of())) == dict.fromkeys(plain)
    assert measure_turn(Edit(a, b, a, turns_of(), None, START)) == dict.fromkeys(plain)
    out = measure_turn(Edit(a, b, a, turns_of([None, box(0, 0, 9, 9)], [None] * 3, target=c)), Scorers(clip))
    by_clip = {"clip", "clip_image", "clip_caption", "direction"}
    assert set(out) == plain | {"psnr_target", "l1_target", "psnr_inside"} | by_clip <= {*METRICS}
    assert out["psnr_first"] is None and out["psnr_outside"] == psnr(a, b, box(0, 0, 9, 9))
    assert out["direction"] is None and out["l1_target"] == l1(c, b)
    one = turns_of([None], [START, START], captions=(None, "a blue star"), target=c)
    given = measure_turn(Edit(a, world.pixels(START), a, one, "a red star", START), Scorers(clip))
    assert given["psnr_target"] == psnr(c, world.pixels(START))  # a given target goes before the truth's
    assert given["direction"] == clip.direction_similarity(a, world.pixels(START), "a red star", "a blue star")


def test_a_chain_that_ended_is_wrong_and_has_no_numbers(clip):
    turns, start = turns_of([None], chain(GREEN)), world.pixels(START)
    done = measure_turn(Edit(start, start, start, turns, None, START), Scorers(clip))
    ended = measure_turn(Edit(None, None, start, turns, None, START), Scorers(clip))
    assert ended.keys() == done.keys()
    assert [ended.pop(key) for key in ("correct", "edited", "kept", "retained")] == [False, False, False, 0]
    assert [ended.pop(key) for key in ("misplaced", "wrong_thing", "unclean")] == [False, True, False]
    assert set(ended.values()) == {None}


def test_every_metric_says_what_it_is():
    for key, metric in METRICS.items():
        assert metric.better in ("higher", "lower") and metric.title and metric.what, key
        assert metric.unit == {"psnr": "dB", "l1": "grey levels"}.get(key.partition("_")[0], metric.unit)
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)


# ---- many


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    got = bootstrap({str(i): [v] for i, v in enumerate(values)}, 3000)
    half = 1.96 * values.std() / 20
    assert got.mean == pytest.approx(values.mean()) and (got.items, got.missing) == (400, 0)
    assert got.low == pytest.approx(values.mean() - half, abs=0.02)
    assert got.high == pytest.approx(values.mean() + half, abs=0.02)
    again, other = (bootstrap({str(i): [v] for i, v in enumerate(values)}, 3000, seed) for seed in (0, 1))
    assert got == again != other


def test_the_interval_is_a_percentile_interval_not_a_symmetric_one():
    few = bootstrap(dict(enumerate([[0]] * 9 + [[1]])))  # a bound is a count of 10, Binomial(10, 0.1)
    assert (few.mean, few.low, few.high) == (0.1, 0, 0.4)  # P(4 or more) = 1.3%, above the tail of 10 items, 0.9%


@pytest.mark.parametrize(("right", "per_item"), [(0.97, 1), (0.8, 1)])
def test_the_interval_of_a_share_holds_the_truth(right, per_item):
    """In 95 of 100 samples of 40 items, or nearly: without the pseudo-items it has no width where all are right."""
    rng = np.random.default_rng(0)
    samples = [(rng.random((40, 1)) < right) * np.ones(per_item) for _ in range(100)]
    shares = [bootstrap(dict(enumerate(sample)), 300, pseudo=SHARE) for sample in samples]
    assert np.mean([got.low <= right <= got.high for got in shares]) >= 0.9
    assert all(got.low <= got.mean <= got.high for got in shares)
    bare = [bootstrap(dict(enumerate(sample)), 300) for sample in samples]
    assert right < 0.9 or np.mean([got.low <= right <= got.high for got in bare]) < 0.8


def test_the_interval_of_a_difference_of_shares_holds_the_truth():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(100):
        a, b = (dict(enumerate((rng.random((40, 1)) < right).astype(float))) for right in (0.995, 0.96))
        got = paired_bootstrap(a, b, 300, pseudo=SHARES_APART)
        held.append(got.low <= 0.035 <= got.high)
    assert np.mean(held) >= 0.93


def test_the_interval_of_few_skewed_values_holds_the_truth():
    rng = np.random.default_rng(2)
    found = [bootstrap(dict(enumerate(rng.gamma(2, size=(10, 1)))), 500) for _ in range(300)]
    assert np.mean([got.low <= 2 <= got.high for got in found]) >= 0.89  # plain percentiles: 0.86


def test_values_of_one_item_are_drawn_together():
    rng = np.random.default_rng(1)
    rows = {str(i): list(rng.normal() + 0.01 * rng.normal(size=12)) for i in range(30)}
    apart = {f"{k} {i}": [v] for k, row in rows.items() for i, v in enumerate(row)}
    together, naive = bootstrap(rows), bootstrap(apart)
    assert together.mean == pytest.approx(naive.mean)
    ratio = (together.high - together.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(np.sqrt(12), rel=0.1)  # twelve copies are no more evidence than one


def test_every_item_weighs_the_same_and_what_is_missing_is_counted():
    got = bootstrap({"a": [True, False, None, np.nan], "b": [1.0, 1.0], "c": [None]})
    assert got[:1] + got[3:] == (0.75, 2, 3) and (got.low, got.high) == (0.5, 1)
    one, none = bootstrap({"a": [2.0, 4.0]}), bootstrap({"a": [None]})
    assert (
        one.mean == 3
        and np.isnan([one.low, one.high, none.mean, none.low]).all()
        and (none.items, none.missing) == (0, 1)
    )
    assert one.verdict() == none.verdict() == "ties"  # one item is no evidence


def test_two_methods_are_compared_value_by_value():
    rng = np.random.default_rng(2)
    a = {str(i): list(10 * rng.normal() + rng.normal(size=4)) for i in range(40)}
    b = {k: [v - 0.5 for v in row] for k, row in a.items()}
    got = paired_bootstrap(a, b)
    assert got.mean == pytest.approx(0.5) and got.high - got.low < 1e-9 and got.verdict() == "wins"
    assert got.verdict("lower") == paired_bootstrap(b, a).verdict() == "loses"
    assert paired_bootstrap(b, a).verdict("lower") == "wins" and paired_bootstrap(a, a).verdict() == "ties"
    assert bootstrap(a).low < bootstrap(b).high  # which the two intervals by themselves do not show
    a["0"], b["1"] = [None, *a["0"][1:]], [*b["1"][:3], np.nan]
    assert paired_bootstrap(a, b).missing == 2 and paired_bootstrap(a, b).mean == pytest.approx(0.5)
    for other in ({**b, "x": [1.0]}, {**b, "0": [1.0]}):
        with pytest.raises(BenchError, match="the same items, seeds and turns"):
            paired_bootstrap(a, other)


def test_intervals_over_items_and_seeds_cover_what_they_should():
    """Of 200 simulated data sets with effects of items, of seeds and of both, 90 to 99% of intervals hold the truth."""
    rng, truth, held, alone = np.random.default_rng(7), 0.3, 0, 0
    for i in range(200):
        item, seed, both = rng.normal(size=(24, 1)), 0.5 * rng.normal(size=(1, 5)), rng.normal(size=(24, 5))
        values = dict(enumerate((truth + item + seed + both).tolist()))
        found = bootstrap(values, n=400, seed=i, seeds=5)
        held += found.low <= truth <= found.high
        found = bootstrap(values, n=400, seed=i)  # as if the values of an item were of no seeds
        alone += found.low <= truth <= found.high
    assert 180 <= held <= 198 and alone < held


def test_resampling_items_and_seeds_is_the_mean_of_the_items_and_seeds_drawn():
    sums, counts = np.array([[1.0, 2.0], [0.0, 5.0], [3.0, 3.0]]), np.array([[1, 2], [0, 1], [1, 1]])
    of = np.array([[2.0, 0.0]]), np.array([[1.0, 1.0, 1.0]])
    assert metrics.resampled(sums, counts, *of) == [(1.0 + 3.0) / 2]  # the second has no value under that seed
    assert metrics.resampled(sums[:, 1:], counts[:, 1:], *(np.ones((1, k)) for k in (1, 3))) == [3.0]
    one = bootstrap({"a": [1, 1, 0, 0], "b": [1, 1, 0, 0]}, n=500, seeds=2)  # nothing but seeds differs
    assert (one.mean, one.low, one.high) == (0.5, 0, 1)
    some = {str(i): [0, None, None] for i in range(40)}  # of three seeds one was run
    assert bootstrap(some, 500, seeds=3, pseudo=SHARE) == bootstrap(
        {k: v[:1] for k, v in some.items()}, 500, pseudo=SHARE
    )._replace(missing=80)
    assert bootstrap({"a": [1, 0, 1, 0], "b": [1, 0, 1, 0]}, n=500, seeds=2)[:3] == (0.5, 0.5, 0.5)


def test_what_is_to_blame_is_the_worst_fault():
    scene = world.scene(3)
    first, *others = scene.objects
    away = replace(first, dx=first.dx + 4 if first.dx < 0 else first.dx - 4)
    colour = next(c for c in world.COLOURS if c not in {o.colour for o in scene.objects})
    moved = replace(scene, objects=(away, *others))
    other = replace(scene, objects=(replace(away, colour=colour), *others))
    pale = world.pixels(scene).copy()
    pale[:8, :8] = 255 - pale[:8, :8]
    for picture, fault in (
        (world.pixels(scene), None), (world.pixels(moved), "misplaced"), (world.pixels(other), "wrong_thing"),
        (None, "wrong_thing"), (pale, "unclean"),
    ):  # fmt: skip
        found = metrics.blame(picture if picture is None else judge.judge(picture, scene))
        assert [name for name, true in found.items() if true] == ([fault] if fault else [])


def test_an_edit_of_a_part_is_judged_inside_by_the_truth_and_outside_by_the_picture_before():
    before = replace(world.scene(3), style="day")
    truth, region = replace(before, style="night"), np.zeros((64, 64), bool)
    region[:, :32] = True
    a, b = world.pixels(truth), world.pixels(before)
    right = np.where(region[..., None], a, b)
    for picture, edited, kept in ((right, True, True), (a, True, False), (b, False, True), (None, False, False)):
        found = metrics.part_verdict(picture, truth, before, region)
        assert (found["edited"], found["kept"], found["correct"]) == (edited, kept, edited and kept)
    turn = Turn("make it night", region, region=region, target=Image.fromarray(right), truth=truth, within=True)
    picture = Image.fromarray(a)
    found = metrics.measure_turn(metrics.Edit(Image.fromarray(b), picture, Image.fromarray(b), [turn], None, before))
    assert found["edited"] and not found["correct"] and found["psnr_inside"] == 100 > found["psnr_outside"]
