"""Pairs of the small world, the objectives, and that each trainer's command makes what loads, and goes on from it."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emilie_min.insert import evaluate, graconet, pairs, train_graconet, train_words
from emilie_min.insert.caption import Captioner
from emilie_min.loading import shipped as shipped_file
from emilie_min.toy import world


def test_the_right_boxes_are_right():
    """Pasted there, the judge sees the object in a free place and nothing else changed."""
    seen = set()
    for seed in range(40):
        p = pairs.pair(seed)
        boxes = {name: b for name, b in zip(world.PLACES, pairs.right_boxes(p)) if not np.isnan(b).any()}
        assert list(boxes) == p.free and p.thing.shape not in {o.shape for o in p.scene.objects}
        for name, (x0, y0, x1, y1) in boxes.items():
            box = (int(x0), int(y0), round(x1 - x0), round(y1 - y0))
            assert p.reached(box) == name
            if p.style == p.scene.style and p.whole:
                assert p.right(graconet.paste(p.base, p.inset, p.mask, box))
            assert p.reached((box[0], box[1], box[2] // 2, box[3])) is None
        seen |= {(p.whole, len(p.free))}
    assert len(seen) == 6


def test_variants_change_the_ground_alone():
    p = next(p for p in map(pairs.pair, range(9)) if p.whole)
    assert p.varied("rectangle").mask.getextrema() == (255, 255)
    outside = np.asarray(p.mask) == 0
    for how, value in (("black", 0), ("white", 255)):
        inset = np.asarray(p.varied(how).inset)
        assert (inset[outside] == value).all() and (inset[~outside] == np.asarray(p.inset)[~outside]).all()


def test_the_objective_asks_for_sound_proposals_and_for_every_place():
    p = next(p for p in map(pairs.pair, range(50)) if len(p.free) == 2)
    right = torch.from_numpy(pairs.right_boxes(p))[None]
    free = right[0][~right[0].isnan().any(-1)]
    both, one = free[None], torch.stack([free[0], free[0]])[None]
    taken = next(i for i, b in enumerate(right[0]) if b.isnan().any())
    y, x = list(world.PLACES.values())[taken]
    wrong = torch.tensor([[[x, y, x + 32, y + 32]]]).float()
    assert train_graconet.loss(both, right) == 0
    assert 0 < train_graconet.loss(one, right) < train_graconet.loss(wrong, right)


def test_a_proposal_without_rounding_is_its_box():
    trans, size = torch.tensor([[[0.4, 0.3, 0.9]]]), torch.tensor([[20.0, 30.0]])
    x0, y0, x1, y1 = train_graconet.proposed(trans, size)[0, 0].tolist()
    x, y, w, h = graconet.box(trans[0, 0], (64, 64), (20, 30))
    assert max(abs(x0 - x), abs(y0 - y), abs(x1 - x0 - w), abs(y1 - y0 - h)) <= 0.5


def test_the_small_graconet_is_trained_and_gone_on_with(tmp_path, capsys):
    first, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    train_graconet.main([str(first), "--pairs", "64"])
    net = graconet.load(first)
    assert net.latent == 16 and net.size == 64
    train_graconet.main([str(again), "--pairs", "32", "--first", "64", "--weights", str(first), "--rate", "1e-2"])
    a, b = load_file(first), load_file(again)
    moved = [(a[k].float() - b[k].float()).abs().max().item() for k in a if k.endswith("regressor.6.weight")]
    assert a.keys() == b.keys() and 0 < max(moved) < 1e-2


@pytest.mark.parametrize("what", ["blip2", "clip"])
def test_the_small_readers_are_trained_and_gone_on_with(tmp_path, capsys, what):
    first, again, ours = tmp_path / "a", tmp_path / "b", shipped_file("toy-blip2/config.json").parent
    eyes = ["--eyes", str(ours)] if what == "clip" else []
    train_words.main([what, str(first), *eyes, "--minutes", "1e-9"])
    more = ["--instructions", "1"] if what == "clip" else []
    train_words.main([what, str(again), "--weights", str(first), *more, "--minutes", "1e-9", "--rate", "1e-4"])
    a, b = (load_file(folder / "model.safetensors") for folder in (first, again))
    assert a.keys() == b.keys() and sum(v.numel() for v in a.values()) < 10**6
    assert any(not torch.equal(a[k], b[k]) for k in a)
    theirs = load_file(shipped_file(f"toy-{what}/config.json").parent / "model.safetensors")
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in a.items()}
    if what == "blip2":
        assert isinstance(Captioner(again, "cpu")(world.render(world.scene(0))), str)


def test_the_shipped_figures_reach_their_goals():
    """`toy-insert.eval.json`, which `emilie_min.insert.evaluate` wrote."""
    found = json.loads(shipped_file("toy-insert.eval.json").read_text())
    first, second = found["graconet"]["as it is"], found["insertion"]
    assert first["pairs"] == second["pairs"] == 200
    assert first["first proposal right"] >= 0.95 > 0.6 > found["graconet"]["chance"]["first proposal right"]
    assert min(found["blip2"].values()) >= 0.98
    assert min(found["clip, the right caption of 100"].values()) >= 0.98
    assert second["right"] >= 0.85


def test_the_shipped_proposer_still_does_what_its_figures_say():
    net = graconet.load(shipped_file("toy-graconet.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate.proposals(net, 40)
    reached, several = found["pairs of several free places where 8 codes reach more than one"]
    assert found["first proposal right"] >= 0.925 and reached >= 0.9 * several


def test_what_keeping_costs_is_measured(shipped):
    """The paste has the inset's colour and not the scene's style, a new object the other way round, a level between."""
    found = evaluate.keeping(shipped, 1, levels=(0.1, 0.5))
    colour, style = found["another colour"], found["another style"]
    off = [colour[how]["off"] for how in ("paste", "keep 0.1", "keep 0.5", "new object")]
    assert off[0] < 1 < off[1] < off[2] and abs(off[3] - off[2]) < 5
    assert style["paste"]["right"] == 0 and style["new object"]["right"] == 1
    assert style["paste"]["off"] > style["keep 0.5"]["off"]


def test_keeping_alone_leaves_the_other_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load", lambda device: None)
    monkeypatch.setattr(evaluate, "keeping", lambda editor, n: {"pairs": n})
    out = tmp_path / "a.json"
    out.write_text('{"blip2": {}, "keep": {"pairs": 30}}')
    evaluate.main(["--keep", "7", "--out", str(out)])
    assert json.loads(out.read_text()) == {"blip2": {}, "keep": {"pairs": 7}} == json.loads(capsys.readouterr().out)
