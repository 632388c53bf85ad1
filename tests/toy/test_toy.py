"""The model that ships: it edits, the demo shows it, the evaluation measures it, the trainer can make it anew."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import emilie_min as emilie
from emilie_min.toy import evaluate, world

WEIGHTS = Path(__file__).parents[2] / "weights" / "toy.safetensors"


@pytest.fixture(scope="module")
def editor():
    return emilie.load(WEIGHTS, device="cpu")


def test_weights_are_small_enough_to_ship(editor):
    assert WEIGHTS.stat().st_size < 20e6
    assert editor.model == "toy/toy.safetensors"


def test_truth_survives_the_autoencoder(editor):
    figures = evaluate.autoencoder(editor, 40)
    assert figures["judged correct"] >= 0.97 and figures["PSNR dB"] >= 30


def test_single_edits_are_mostly_right(editor):
    right = []
    for i, kind in enumerate(world.KINDS):
        scene, steps = evaluate.script(evaluate.FIRST + i, kind, 1)
        right += evaluate.run_edits(emilie.open(world.render(scene), editor, seed=i), steps)
    assert np.mean(right) >= 0.6  # `emilie toy-eval` measures it on 200; this many can fail by chance alone


def test_the_instruction_decides(editor):
    """One scene, two instructions, two results; and the text scale matters."""
    canvas = emilie.open(world.render(world.scene(1)), editor, seed=0)
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
        emilie.open(world.render(world.scene(0)), editor)


def test_evaluation_writes_its_figures(editor, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "IDLE_TURNS", 2)
    monkeypatch.setattr(evaluate, "TURNS", 2)
    figures = evaluate.evaluate(editor, 1, tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert set(figures["edits"]["by kind"]) <= set(world.KINDS)
    assert figures["twins"].keys() == {"scenes", "anchor", "eq8", "guidance", "no mask"}
    assert figures["twins"]["eq8"] == 0
    idle = figures["nothing"]
    assert all(len(idle[way][what]) == 2 for way in list(idle)[1:] for what in ("dB", "right"))
    assert idle["latent iteration"]["dB"] != idle["image iteration"]["dB"]  # not one way under two names
    assert idle["autoencoder alone"]["dB"][0] > 30 and idle["autoencoder alone"]["right"][0] == 1
