"""The trainer: what it draws, what it asks of the model, and that a kill costs it little."""

import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import emilie_min as emilie
from emilie_min.toy import evaluate, train, world

WEIGHTS = Path(__file__).parents[2] / "weights" / "toy.safetensors"
SEEDS = range(train.FIRST_SEED, train.FIRST_SEED + 2000)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, args), "--device", "cpu", "--workers", "1"])
    train.main()


def twins_of(scene):
    shapes = [o.shape for o in scene.objects]
    return [o for o in scene.objects if shapes.count(o.shape) > 1]


# ---- pairs


def test_pairs_are_mixed_as_asked():
    pairs = [train.edit_pair(seed) for seed in SEEDS]
    twins = [twins_of(before) for before, _, _ in pairs if twins_of(before)]
    assert 0.13 < len(twins) / len(pairs) < 0.17
    assert 0.5 < np.mean([one.colour == other.colour for one, other in twins]) < 0.7
    practised = [train.edit_pair(seed, 0, 0.35) != train.edit_pair(seed, 0, 0) for seed in SEEDS]
    assert 0.32 < np.mean(practised) < 0.38
    assert all(twins_of(train.edit_pair(seed, 1)[0]) for seed in SEEDS[:50])
    assert all(train.edit_pair(seed, 0, 1)[1].startswith("add") for seed in SEEDS[:50])
    assert not any(twins_of(scene) for seed in SEEDS for scene in train.edit_pair(seed, 0)[::2])


def test_of_two_equal_objects_either_may_be_the_one():
    first = 0
    for seed in SEEDS[:400]:
        before, _, after = train.edit_pair(seed, 1)
        one, other = twins_of(before)
        assert (one in after.objects) != (other in after.objects)
        first += one not in after.objects
    assert 160 < first < 240


def test_training_never_sees_held_out_pairs_or_evaluation_scenes():
    for seed in SEEDS[:500]:
        before, _, after = train.edit_pair(seed)
        for scene in (before, after):
            assert not any((o.colour, o.shape) in world.HELD_OUT for o in scene.objects)
    assert evaluate.FIRST + 10**6 < train.FIRST_SEED


def test_chunks_come_in_order_from_any_step():
    chunks = train.Chunks(train.draw_edits, 3, 0.15, 0.35)
    feed = train.feed(chunks, 5, workers=2)
    for i in range(5, 9):
        before, after, texts = next(feed)
        pairs = [train.edit_pair(train.FIRST_SEED + 3 * i + k) for k in range(3)]
        assert list(texts) == [text for _, text, _ in pairs]
        assert np.array_equal(before, np.stack([world.pixels(pair[0]) for pair in pairs]))
        assert np.array_equal(after, np.stack([world.pixels(pair[2]) for pair in pairs]))
    captions = train.Chunks(train.draw_captioned, 2, 0, 0)[0][1]
    assert captions == [world.caption(train.edit_pair(train.FIRST_SEED + k, 0, 0)[2]) for k in range(2)]


# ---- the objective


def test_what_each_row_of_a_batch_loses():
    u = torch.tensor([0.02, 0.07, 0.12, 0.5])  # the text, both, the picture, nothing
    z_img, target, source = (torch.full((4, 4, 2, 2), v) for v in (1.0, 2.0, 3.0))
    tokens, empty = torch.ones(4, 77, dtype=torch.long), torch.zeros(1, 77, dtype=torch.long)
    kept, wanted, told = train.drop(z_img, target, tokens, empty, source, u)
    assert wanted[:, 0, 0, 0].tolist() == [3, 2, 2, 2]  # asked for nothing: the same picture
    assert kept[:, 0, 0, 0].tolist() == [1, 0, 0, 1] and told[:, 0].tolist() == [0, 0, 1, 1]
    assert train.drop(z_img, target, tokens, empty, None, u)[1].equal(target)
    shares = [(train.drop(z_img[:1], target[:1], tokens[:1], empty)[2] == 0).all().item() for _ in range(2000)]
    assert 0.08 < np.mean(shares) < 0.12


@pytest.mark.parametrize("null_target", ["source", "edited"])
def test_asked_for_nothing_the_target_is_the_source(null_target, tmp_path, monkeypatch):
    seen = []

    def denoising(model, z_img, target, tokens, cumprod, autocast):
        seen.append((z_img, target, tokens))
        return sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(train, "denoising", denoising)
    monkeypatch.setattr(train, "PREFILL", 1)
    options = (
        "--weights",
        WEIGHTS,
        "--runs",
        tmp_path,
        "--minutes",
        1e-4,
        "--batch",
        128,
        "--null-target",
        null_target,
    )
    run(monkeypatch, tmp_path / "out.safetensors", *options)
    editor = emilie.load(WEIGHTS, device="cpu")
    z_img, target, tokens = seen[0]
    no_text = (tokens == editor.text.tokenize([""])).all(1)
    no_image = (z_img == 0).all((1, 2, 3))
    same = (target - editor.scale_factor * z_img).abs().amax((1, 2, 3)) < 1e-5
    assert 0 < (no_text & ~no_image).sum() < 20 and (no_text & no_image).any() and (~no_text & no_image).any()
    assert same.equal(no_text & ~no_image if null_target == "source" else torch.zeros_like(same))


def test_the_loss_is_of_the_noise_in_the_target():
    cumprod = torch.linspace(0.999, 0.001, 1000)
    z_img, target = torch.randn(64, 4, 2, 2), torch.randn(64, 4, 2, 2)

    def knows(x, t, told):
        a = cumprod[t][:, None, None, None]
        assert x[:, 4:].equal(z_img) and told.equal(z_img)
        return (x[:, :4] - a.sqrt() * target) / (1 - a).sqrt()

    idle = torch.autocast("cpu", enabled=False)
    loss = partial(train.denoising, z_img=z_img, target=target, tokens=z_img, cumprod=cumprod, autocast=idle)
    assert loss({"unet": knows, "text": lambda x: x}) < 1e-6
    assert 2 < loss({"unet": lambda x, t, told: 0 * x[:, :4], "text": lambda x: x}) < train.BOUND


@torch.no_grad()
def test_a_fresh_unet_predicts_nothing():
    unet = emilie.load("random", "toy", device="cpu").unet
    x, context = torch.randn(1, 8, 16, 16), torch.randn(1, 77, 96)
    assert unet(x, torch.ones(1), context).abs().max() > 0
    train.zero_last_layers(unet)
    assert unet(x, torch.ones(1), context).abs().max() == 0
    assert not any(block.out_layers[3].weight.any() for block in unet.modules() if hasattr(block, "out_layers"))


def test_the_buffer_forgets_the_oldest():
    buffer = train.Buffer(4)
    for i in range(3):
        buffer.add(torch.arange(2 * i, 2 * i + 2), torch.full((2, 3), i))
    numbers, rows = buffer.sample(200)
    assert set(numbers.tolist()) == {2, 3, 4, 5} and rows.shape == (200, 3)
    assert (rows[:, 0] == numbers // 2).all()


@torch.no_grad()
def test_latents_take_the_scale_of_the_config():
    vae = emilie.load("random", "toy", device="cpu").vae
    for p in vae.parameters():
        p.add_(0.05 * torch.randn_like(p))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, logvar = vae.moments(x)
    before = vae.decode(mean)
    train.scale_latents(vae, x, 2.3)
    scaled, spread = vae.moments(x)
    assert scaled.std().item() == pytest.approx(2.3, rel=1e-4)
    assert torch.allclose((spread / 2).exp() / scaled.std(), (logvar / 2).exp() / mean.std(), rtol=1e-4)
    assert torch.allclose(vae.decode(scaled), before, atol=1e-5)


# ---- going on


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Trains a line through the origin towards `slope`; a batch takes a millisecond by its clock."""
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=count(step=0.001).__next__))
    monkeypatch.setattr(train, "WARM_UP", 1)

    def fit(seconds, slope=3.0, **begun):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)

        def loss(x):
            return (model(x) - slope).square().mean()

        batches = repeat((torch.ones(1, 1),))
        return model, *train.fit(model, tmp_path / "line.pt", lambda step: batches, loss, seconds / 60, 0.1, **begun)

    return fit


def test_a_run_goes_on_and_its_average_lags_behind(line, capsys):
    model, average, steps = line(0.0205)
    assert steps == 21 and 0 < average.weight.item() < model.weight.item() < 3
    again, average, steps = line(0.2005)
    assert steps == 201 and "going on from step 21" in capsys.readouterr().out
    assert again.weight.item() == pytest.approx(3, abs=0.1)
    _, same, steps = line(0.2005)  # its time is spent
    assert steps == 201 and same.weight.equal(average.weight)


def test_another_runs_state_and_a_loss_that_is_not_finite_are_refused(line, tmp_path):
    line(0.0205, weights="none")
    with pytest.raises(emilie.EmilieError, match="--runs"):
        line(0.0205, weights="others")
    with pytest.raises(emilie.EmilieError, match="loss is nan"):
        line(0.0405, slope=float("nan"), weights="none")
    assert torch.load(tmp_path / "line.pt", weights_only=True)["step"] == 21


def test_killed_and_resumed_from_nothing(tmp_path, monkeypatch, capsys):
    """kill -9 leaves a whole state and no process; the same command goes on to weights that load."""
    out, state = tmp_path / "toy.safetensors", tmp_path / "unet.pt"
    options = [str(out), "--runs", str(tmp_path), "--batch", "2", "--save-every", "0.2"]
    command = [sys.executable, "-m", "emilie_min.toy.train", *options, "--device", "cpu", "--minutes", "0.04"]
    process = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.PIPE, text=True)
    while not state.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=60)  # at its end no worker holds the pipe any more
    assert said.startswith("vae:")
    before = torch.load(state, weights_only=True)
    minutes = (before["seconds"] + 1) / 60 / 0.75
    run(monkeypatch, *options, "--minutes", minutes)
    assert f"going on from step {before['step']}" in capsys.readouterr().out
    after = torch.load(state, weights_only=True)
    assert after["step"] > before["step"] > 0
    editor = emilie.load(out, device="cpu")
    for name, weight in editor.unet.state_dict().items():
        assert weight.equal(after["average"][f"module.unet.{name}"].half().float())
    for network in (editor.unet, editor.vae, editor.text):
        assert all(p.isfinite().all() for p in network.parameters())
    emilie.open(world.render(world.scene(0)), editor).edit("make it night", steps=1)


def test_the_sister_begins_from_an_editing_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "PREFILL", 1)
    few = ("--runs", tmp_path, "--minutes", 1e-4, "--batch", 2)
    run(monkeypatch, tmp_path / "t2i.safetensors", "--config", "toy-t2i", "--weights", WEIGHTS, *few)
    sister, first = emilie.load(tmp_path / "t2i.safetensors", device="cpu"), emilie.load(WEIGHTS, device="cpu")
    assert sister.model.startswith("toy-t2i/")
    mine, whole = (editor.unet.input_blocks[0][0].weight for editor in (sister, first))
    assert torch.allclose(mine, whole[:, :4], atol=1e-3)
    own, shared = sister.vae.state_dict(), first.vae.state_dict()
    assert all(torch.equal(own[key], shared[key]) for key in shared)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "toy.safetensors", "--weights", tmp_path / "t2i.safetensors", *few)
    assert "do not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    [("--twins", 2), ("--twins", -0.1), ("--batch", 0), ("--batch", 10**6), ("--minutes", -1), ("--places", "nan"),
     ("--places", 1.1), ("--places", -0.1)],
)  # fmt: skip
def test_bad_settings(bad, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "out.safetensors", "--minutes", 0, *bad)
    assert bad[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_weights_have_their_ending(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "out.ckpt", "--minutes", 0)
    assert "written as a .safetensors file" in capsys.readouterr().err and not list(tmp_path.iterdir())
