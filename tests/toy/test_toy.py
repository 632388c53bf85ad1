"""The model that ships: it edits, the demo shows it, the evaluation measures it, the trainer can make it anew."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import emilie_min as emilie
from emilie_min.app import cli
from emilie_min.toy import evaluate, train, world

WEIGHTS = Path(__file__).parents[2] / "weights" / "toy.safetensors"


@pytest.fixture(scope="module")
def editor():
    return emilie.load(WEIGHTS, device="cpu")


def test_weights_are_small_enough_to_ship(editor):
    assert WEIGHTS.stat().st_size < 20e6
    assert editor.model == "toy/toy.safetensors"


def test_truth_survives_the_autoencoder(editor):
    figures = evaluate.autoencoder(editor, 60)
    assert figures["judged correct"] >= 0.97 and figures["PSNR dB"] >= 30


def test_single_edits_are_mostly_right(editor):
    right = []
    for i in range(12):
        scene, steps = evaluate.script(evaluate.FIRST + i, world.KINDS[i % len(world.KINDS)], 1)
        right += evaluate.follow(editor.open(world.render(scene), seed=i), steps)
    assert np.mean(right) >= 0.6  # `emilie toy-eval` measures it on 200; this many can fail by chance alone


def test_the_instruction_decides(editor):
    """One scene, two instructions, two results; and the text scale matters."""
    canvas = editor.open(world.render(world.scene(1)), seed=0)
    night = np.asarray(canvas.edit("make it night"), float).mean()
    canvas.undo()
    pastel = np.asarray(canvas.edit("turn it into a pastel drawing"), float).mean()
    assert night < pastel - 40


def test_the_text_to_image_model_draws_what_a_caption_says():
    editor = emilie.load(WEIGHTS.with_name("toy-t2i.safetensors"), device="cpu")
    assert editor.model == "toy-t2i/toy-t2i.safetensors"
    assert WEIGHTS.with_name("toy-t2i.safetensors").stat().st_size < 20e6
    assert evaluate.captions(editor, 8)["all as the caption says"] >= 0.75
    own, shared = editor.vae.state_dict(), emilie.load(WEIGHTS, device="cpu").vae.state_dict()
    assert all(torch.equal(own[key], shared[key]) for key in shared)
    with pytest.raises(emilie.EmilieError, match="4 channels"):
        editor.open(world.render(world.scene(0)))


def test_demo(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    names = ["0_input.png", "1.png", "2.png", "3.png", "4.png", "strip.png"]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == names
    assert all(name in out for name in names) and "of 4 pictures" in out
    strip = Image.open(tmp_path / "demo" / "strip.png")
    assert strip.width > 5 * 256 and strip.height > 256


def test_evaluation_writes_its_figures(editor, tmp_path):
    figures = evaluate.evaluate(editor, 2, tmp_path / "figures.json", quick=True)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert set(figures["edits"]["by kind"]) <= set(world.KINDS)


def test_training_resumes_and_exports_a_model_that_loads(tmp_path, monkeypatch, capsys):
    def stage(*args):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, args), "--runs", str(tmp_path), "--device", "cpu"])
        train.main()
        return capsys.readouterr().out

    assert "scale_factor" in stage("vae", "--steps", 1, "--batch", 2)
    assert "going on from step 1" in stage("vae", "--steps", 2, "--batch", 2)
    stage("edit", "--steps", 2, "--batch", 2, "--pool", 4, "--reuse", 2)
    assert "going on from step 2" in stage("edit", "--steps", 3, "--batch", 2, "--pool", 4, "--reuse", 2)
    assert torch.load(tmp_path / "edit.pt", weights_only=True)["step"] == 3
    stage("export", tmp_path / "toy.safetensors")
    fresh = emilie.load(tmp_path / "toy.safetensors", device="cpu")
    assert fresh.family == "raw"
    fresh.open(world.render(world.scene(0))).edit("make it night", steps=1)


def test_training_never_sees_held_out_pairs_or_evaluation_scenes():
    for seed in range(train.FIRST_SEED, train.FIRST_SEED + 300):
        before, _, after = train.edit_pair(seed)
        for scene in (before, after):
            assert not any((o.colour, o.shape) in world.HELD_OUT for o in scene.objects)
    assert evaluate.FIRST + 10**6 < train.FIRST_SEED


def test_what_doing_less_costs(monkeypatch):
    few = {evaluate.REFERENCE: {"steps": 8}, "again": {"steps": 8}, "half": {"steps": 4}}
    assert list(evaluate.LESS)[0] == evaluate.REFERENCE and evaluate.LESS[evaluate.REFERENCE] == {"steps": 100}
    monkeypatch.setattr(evaluate, "LESS", few)
    figures = evaluate.less(emilie.load(device="cpu"), 2)
    assert figures.keys() == {"scenes", *few}
    assert figures["again"]["grey levels"] == 0 < figures["half"]["grey levels"] < 20
    assert figures[evaluate.REFERENCE]["time"] == 1 > figures["half"]["time"]
    assert all(0 <= figures[way]["right"] <= 1 for way in few)
