"""Methods by name, chains of edits that can stop and go on anywhere, and the run that puts them on disk."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from command import run as command
from PIL import Image
from safetensors.torch import load_file, save

import emilie_min as emilie
from emilie_min.app import cli
from emilie_min.bench import data
from emilie_min.bench.cli import which_shard
from emilie_min.bench.run import Models, noise_seed, read_run, run, state
from emilie_min.canvas import images
from emilie_min.errors import BenchError, CheckpointError, SamplingError
from emilie_min.methods import METHODS, Request, parse
from emilie_min.toy import world

RANDOM = Models("random", device="cpu")
MINE = """
import os
from dataclasses import dataclass, replace
from emilie_min.errors import SamplingError
from emilie_min.methods.base import Method

@dataclass
class Mine(Method):
    editor: object
    strength: float = 1.0
    fail_at: int | None = None
    edits = 0

    def edit(self, chain, request):
        Mine.edits += 1
        if Mine.edits == int(os.environ.get("STOP_AT", 0)):
            raise KeyboardInterrupt
        if len(chain.requests) + 1 == self.fail_at:
            raise SamplingError("as asked")
        image = chain.image.point(lambda v: int(v * (1 - 0.1 * self.strength)) + chain.seed % 7)
        return replace(chain, image=image, requests=(*chain.requests, request), notes={"n": len(chain.requests)})
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "imie"
    data.make(folder, scenes=3, turns=2)
    return folder


@pytest.fixture(scope="module")
def plan(bench, tmp_path_factory):
    out = tmp_path_factory.mktemp("planned") / "run"
    run(bench, ["ip2p"], out, [0], RANDOM, steps=1, shard=(9, 9))
    return out


@pytest.fixture
def planned(plan, tmp_path):
    """A run that has no edits yet, to be changed."""
    return shutil.copytree(plan, tmp_path / "planned")


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return f"{path}:Mine"


def files(folder):
    """Every file of a run's edits; of the records what does not depend on the clock."""
    out = {}
    for path in sorted(path for path in (folder / "edits").rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.loads(content)
            content.pop("seconds")
        out[str(path.relative_to(folder / "edits"))] = content
    return out


def requests():
    return [Request("make it night", world.mask("top left")), Request("make it day"), Request("turn it into a comic")]


def follow(method, picture, seed=5):
    chain, chains = method.open(picture, seed), []
    for request in requests():
        chain = method.edit(chain, request)
        chains.append(chain)
    return chains


# ---- the methods that follow instructions


def test_emilie_as_a_method_is_a_canvas_session_bit_for_bit(editor, picture):
    method = METHODS["emilie"](editor, gate="guidance", steps=2)
    canvas = emilie.open(picture, editor, seed=5)
    for chain, request in zip(follow(method, picture), requests()):
        image = canvas.edit(request.instruction, request.mask, gate="guidance", steps=2)
        assert chain.image.tobytes() == image.tobytes()
        assert torch.equal(chain.latent, canvas.latent) and chain.notes == {"f": canvas.state.f}
        assert (chain.mask is None) == (request.mask is None)


def test_iterative_instruct_pix2pix_is_the_canvas_that_iterates_pictures(editor, picture):
    canvas = emilie.open(picture, editor, seed=5)
    for chain, request in zip(follow(METHODS["ip2p"](editor, pixels="round", steps=2), picture), requests()):
        image = canvas.edit(request.instruction, steps=2, iterate="image")  # it has no masks
        assert chain.image.tobytes() == image.tobytes() and torch.equal(chain.latent, canvas.latent)


def test_truncation_darkens_by_half_a_level_and_float_skips_the_picture(editor, picture):
    runs = {p: follow(METHODS["ip2p"](editor, pixels=p, steps=2), picture) for p in ("truncate", "round", "float")}
    first = {p: np.asarray(chains[0].image, float) for p, chains in runs.items()}
    assert torch.equal(runs["truncate"][0].latent, runs["round"][0].latent)
    apart = first["round"] - first["truncate"]
    assert apart.min() == 0 and apart.max() == 1 and 0.3 < apart.mean() < 0.6
    with torch.no_grad():
        z_img = editor.vae.encode(editor.decode(runs["float"][0].latent))
    again = METHODS["ip2p"](editor, pixels="round", steps=2)
    assert torch.equal(runs["float"][0].latent, runs["round"][0].latent)
    assert not torch.equal(runs["float"][1].latent, runs["round"][1].latent)
    assert not torch.equal(z_img, editor.encode(images.to_tensor(runs["round"][0].image)))
    assert again.edit(runs["round"][0], requests()[1]).latent.equal(runs["round"][1].latent)


def test_concatenated_instructions_start_from_the_opened_picture(editor, picture):
    chains = follow(METHODS["concat"](editor, steps=2), picture)
    single = follow(METHODS["ip2p"](editor, steps=2), picture)
    assert torch.equal(chains[0].latent, single[0].latent)
    text = "make it night, make it day, turn it into a comic"
    method = METHODS["ip2p"](editor, steps=2)
    start = method.open(picture, 5)
    start = type(start)(start.original, 5, start.image, None, tuple(requests()[:2]))
    assert torch.equal(chains[2].latent, method.edit(start, Request(text)).latent)
    assert chains[2].notes == {"tokens": 2 + 3 + 3 + 5}


def test_a_text_that_is_too_long_is_cut_and_told(editor, picture):
    method = METHODS["concat"](editor, steps=1)
    chain = method.edit(method.open(picture, 0), Request(" ".join(["red"] * 200)))
    assert chain.notes == {"tokens": 77}


def test_a_model_of_captions_is_refused(picture):
    with pytest.raises(CheckpointError, match="4 channels"):
        method = METHODS["ip2p"](emilie.load("random", "toy-t2i", device="cpu"), steps=1)
        method.edit(method.open(picture, 0), Request("make it night"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("emilie", {"gate": "foo"}, "unknown gate 'foo'"),
        ("emilie", {"steps": 0}, "steps must be a whole number from 1 to 1000"),
        ("ip2p", {"pixels": "foo"}, "pixels must be truncate, round or float"),
        ("concat", {"text_scale": float("nan")}, "text_scale must be a finite number"),
    ],
)
def test_settings_that_no_edit_can_use_are_told_before_the_first_edit(name, settings, message, editor):
    with pytest.raises(SamplingError, match=message):
        METHODS[name](editor, **settings)


# ---- names


def test_a_name_carries_settings():
    method, settings = parse("emilie:gate=eq8:steps=20:masks=false:text_scale=none")
    assert method is METHODS["emilie"]
    assert settings == {"gate": "eq8", "steps": 20, "masks": False, "text_scale": None}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("emily", "no method 'emily': choose from emilie, ip2p"),
        ("emilie:gates=eq8", "has no setting 'gates', but: gate, rescale"),
        ("emilie:eq8", "has no setting 'eq8'"),
        ("emilie:steps=many", "steps must be of type int, not 'many'"),
        ("emilie:masks=perhaps", "masks must be of type bool"),
        ("there_is_none.py:Mine", "there is no file there_is_none.py"),
        ("there_is_none.py", "name the class behind the file"),
    ],
)
def test_a_wrong_name_is_told(spec, message):
    with pytest.raises(BenchError, match=message):
        parse(spec)


def test_a_method_of_ones_own_comes_from_a_file(mine, tmp_path):
    method, settings = parse(f"{mine}:strength=0.5")
    assert method.__name__ == "Mine" and settings == {"strength": 0.5}
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(BenchError, match="cannot be run: ModuleNotFoundError"):
        parse(f"{tmp_path / 'broken.py'}:Mine")
    others = "from emilie_min.methods.base import Method\nOther = 3\nclass Plain: pass\nclass Bare(Method): pass\n"
    others += "from dataclasses import dataclass\n@dataclass\nclass Data: x: int\n"
    (tmp_path / "others.py").write_text(others)
    for name in ("None", "Other", "Plain", "Bare", "Data"):
        with pytest.raises(BenchError, match=f"has no class {name}"):
            parse(f"{tmp_path / 'others.py'}:{name}")
    with pytest.raises(BenchError, match="name the class behind the file"):
        parse(f"{tmp_path / 'mine.py'}:strength=0.5")


# ---- runs


def test_a_run_is_on_disk_and_says_what_it_was(bench, mine, tmp_path):
    done = run(bench, ["emilie", f"{mine}:strength=2"], tmp_path / "run", [1, 0], RANDOM, steps=1)
    assert state(done) == (0, 0)
    info = done.info
    assert info["seeds"] == [0, 1] and info["models"]["instructions"] == {"name": "toy/random", "sha256": None}
    assert info["methods"]["emilie"]["settings"]["steps"] == 1
    assert info["methods"][f"{mine}:strength=2"]["settings"]["strength"] == 2
    assert info["versions"]["torch"] == torch.__version__ and len(info["bench_sha256"]) == 64
    item = done.items[0]
    folder = tmp_path / "run" / "edits" / "emilie" / "1" / item.id
    assert Image.open(folder / "0.png").tobytes() == Image.open(item.image).tobytes()
    canvas = emilie.open(item.image, emilie.load("random", "toy", device="cpu"), seed=noise_seed(1, item.id))
    for number, turn in enumerate(item.turns, 1):
        image = canvas.edit(turn.instruction, turn.mask, steps=1)
        outcome = done.outcome("emilie", 1, item.id, number)
        assert Image.open(outcome.image).tobytes() == image.tobytes() and outcome.seconds > 0
        assert torch.equal(load_file(folder / f"{number}.safetensors")["latent"], canvas.latent)
        assert (outcome.mask is None) == (turn.mask is None)


def test_a_method_is_told_what_each_turn_s_picture_shows_before(bench, tmp_path):
    path = tmp_path / "told.py"
    path.write_text(MINE.replace('notes={"n": len(chain.requests)}', 'notes={"before": request.before}'))
    done = run(bench, [f"{path}:Mine"], tmp_path / "run", [0], RANDOM)
    for item in done.items:
        captions = [item.caption, *(turn.caption for turn in item.turns)]
        told = [done.outcome(f"{path}:Mine", 0, item.id, turn).notes["before"] for turn in (1, 2)]
        assert told == captions[:2] and len(set(captions)) == 3


def test_noise_is_keyed_by_seed_and_item_and_shared_by_methods():
    known = {noise_seed(seed, item) for seed in range(5) for item in ("0001", "0002", "10001")}
    assert len(known) == 15 and all(0 <= seed < 2**63 for seed in known)
    assert noise_seed(1, "0001") == 0x59DF119996723BF8  # a run can be made again elsewhere


def test_a_run_whose_noise_was_keyed_otherwise_is_not_continued(bench, tmp_path):
    run(bench, ["ip2p"], tmp_path / "run", [0], RANDOM, steps=1)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info.pop("noise") == "seed and item"
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    with pytest.raises(BenchError, match="another noise"):
        run(bench, ["ip2p"], tmp_path / "run", [0], RANDOM, steps=1)


def test_a_killed_run_goes_on_without_redoing_or_losing_an_edit(bench, mine, tmp_path, monkeypatch):
    def go(out):
        return run(bench, ["emilie", mine], out, [0], RANDOM, steps=1)

    go(tmp_path / "whole")
    for stop in (2, 5):  # in the middle of a chain, and between two
        out = tmp_path / f"stopped-{stop}"
        monkeypatch.setenv("STOP_AT", str(stop))
        with pytest.raises(KeyboardInterrupt):
            go(out)
        monkeypatch.delenv("STOP_AT")
        half = {path: path.stat().st_mtime_ns for path in (out / "edits").rglob("[1-9]*.*") if path.is_file()}
        assert 0 < len(half) < len(files(tmp_path / "whole"))
        go(out)
        assert files(out) == files(tmp_path / "whole")
        assert {path: path.stat().st_mtime_ns for path in half} == half


@pytest.mark.parametrize("signed", [True, False])  # False: of a run of before, whose records have no digests
def test_a_damaged_turn_is_told_and_never_gone_on_from(bench, tmp_path, signed):
    out = tmp_path / "run"
    run(bench, ["emilie"], out, [0], RANDOM, steps=1)
    folder = out / "edits/emilie/0/0001"
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    latent = load_file(folder / "1.safetensors")["latent"]
    flipped = bytearray(whole[folder / "1.safetensors"])
    flipped[-1] ^= 1
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    odd = [{"other": latent}, {"latent": latent[..., :8].clone()}, {"latent": latent.int()}, {"latent": latent / 0}]
    ways = {"1.png": [(tmp_path / "small.png").read_bytes()], "1.safetensors": [b"", *map(save, odd)]}
    ways = {"1.safetensors": [bytes(flipped), None]} if signed else ways
    for name, spoilt in [(name, one) for name, each in ways.items() for one in each]:
        for path, content in whole.items():
            path.write_bytes(content)
        (folder / "2.json").unlink()
        if not signed:
            record = json.loads((folder / "1.json").read_text())
            assert record.pop("files").keys() <= {"1.png", "1.safetensors", "1_mask.png"}
            (folder / "1.json").write_text(json.dumps(record))
        (folder / name).unlink() if spoilt is None else (folder / name).write_bytes(spoilt)
        with pytest.raises(BenchError, match=r"0001: turn 1 is damaged .*remove this folder") as told:
            run(bench, ["emilie"], out, [0], RANDOM, steps=1)
        assert "\n" not in str(told.value) and not (folder / "2.json").exists()


def test_shards_give_what_one_process_gives(bench, tmp_path):
    for i in (1, 2, 3):
        done = run(bench, ["emilie", "concat"], tmp_path / "shards", [0], RANDOM, shard=(i, 3), steps=1)
        assert state(done)[0] == 12 - 4 * i
    run(bench, ["emilie", "concat"], tmp_path / "one", [0], RANDOM, steps=1)
    assert files(tmp_path / "shards") == files(tmp_path / "one")


def test_a_method_without_randomness_is_run_under_one_seed(bench, mine, tmp_path):
    path = tmp_path / "still.py"
    path.write_text(MINE.replace("    editor: object", "    seeded = False\n    editor: object"))
    done = run(bench, [f"{path}:Mine"], tmp_path / "run", [3, 4], RANDOM)
    assert state(done) == (0, 0) and sys.modules["emilie_method_still"].Mine.edits == 6
    three, four = ([done.outcome(f"{path}:Mine", seed, item.id, 2) for item in done.items] for seed in (3, 4))
    assert three == four and all(result.image.is_file() for result in three)
    info = json.loads((tmp_path / "run" / "run.json").read_text())  # of a run by an earlier version, a folder a seed
    info["methods"][f"{path}:Mine"].pop("seeded")
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    assert state(read_run(tmp_path / "run")) == (12, 0)
    assert state(run(bench, [f"{path}:Mine"], tmp_path / "run", [4], RANDOM)) == (6, 0)


def test_a_failed_edit_is_recorded_ends_its_chain_alone_and_is_tried_again(bench, mine, tmp_path, capsys):
    spec = f"{mine}:fail_at=2"
    done = run(bench, [spec, "ip2p"], tmp_path / "run", [0], RANDOM, steps=1)
    assert state(done) == (0, 3)
    outcome = done.outcome(spec, 0, done.items[0].id, 2)
    assert outcome.error == "as asked" and outcome.image is None
    assert done.outcome(spec, 0, done.items[0].id, 1).image.is_file()
    before = sys.modules["emilie_method_mine"].Mine.edits
    run(bench, [spec, "ip2p"], tmp_path / "run", [0], RANDOM, steps=1)
    again = sys.modules["emilie_method_mine"].Mine.edits  # the file was run anew, so its count began anew
    assert (before, again) == (6, 3)


def test_further_methods_and_seeds_join_a_run_but_other_settings_do_not(bench, tmp_path):
    out = tmp_path / "run"
    run(bench, ["ip2p"], out, [0], RANDOM, steps=1)
    done = run(bench, ["concat"], out, [2], RANDOM, steps=1)
    assert list(done.info["methods"]) == ["ip2p", "concat"] and done.info["seeds"] == [0, 2]
    assert state(done) == (12, 0)  # each has run on its own seed only
    assert list(read_run(out, ["concat", "ip2p"]).info["methods"]) == ["concat", "ip2p"]
    with pytest.raises(BenchError, match="no method 'emilie', but: ip2p, concat"):
        read_run(out, ["emilie"])
    with pytest.raises(BenchError, match=r"other methods \(ip2p\)"):
        run(bench, ["ip2p"], out, [0], RANDOM, steps=2)
    with pytest.raises(BenchError, match=r"other models \(instructions\)"):
        run(bench, ["ip2p"], out, [0], steps=1)


def test_a_setting_that_json_has_no_word_for_is_no_other_setting(bench, tmp_path):
    path = tmp_path / "pair.py"
    path.write_text(MINE.replace("fail_at: int | None = None", "fail_at: int | None = None\n    pair: tuple = (1, 2)"))
    for _ in range(2):
        assert state(run(bench, [f"{path}:Mine"], tmp_path / "run", [0], RANDOM)) == (0, 0)


def test_a_benchmark_that_changed_is_told(tmp_path):
    data.make(tmp_path / "bench", scenes=1, turns=1)
    run(tmp_path / "bench", ["ip2p"], tmp_path / "run", [0], RANDOM, steps=1)
    lines = (tmp_path / "bench" / "bench.jsonl").read_text()
    (tmp_path / "bench" / "bench.jsonl").write_text(lines + "\n")
    with pytest.raises(BenchError, match="has changed since"):
        read_run(tmp_path / "run")
    with pytest.raises(BenchError, match="another bench_sha256"):
        run(tmp_path / "bench", ["ip2p"], tmp_path / "run", [0], RANDOM, steps=1)
    with pytest.raises(BenchError, match="run.json cannot be read"):
        read_run(tmp_path)
    for methods, seeds in ((["ip2p"], []), ([], [0])):
        with pytest.raises(BenchError, match="one method and one seed"):
            run(tmp_path / "bench", methods, tmp_path / "run", seeds, RANDOM)
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(BenchError, match="give i/n with i from 1 to n"):
            run(tmp_path / "bench", ["ip2p"], tmp_path / "run", [0], RANDOM, shard)
    with pytest.raises(BenchError, match="have the same name"):
        run(tmp_path / "bench", ["ip2p", "ip2p"], tmp_path / "run", [0], RANDOM)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seeds", [], "seeds is empty"),
        ("seeds", "0", "seeds must be a list"),
        ("seeds", [True], r"seeds\[0\] must be a whole number"),
        ("methods", {}, "methods is empty"),
        ("methods", {"ip2p": 5}, "methods.ip2p must be an object"),
        ("methods", {"\x1b[2J": {"class": "A", "needs": "b", "settings": {}}}, r"damaged: it names '\\x1b\[2J'"),
        ("bench", 5, "bench must be a text"),
        ("bench", "\x1b[2J", "damaged"),
        ("continued_with", 5, "continued_with must be a list"),
        ("versions", None, "versions must be an object"),
        ("models", [1], "models must be an object"),
    ],
)
def test_a_damaged_run_is_told(field, value, message, planned, bench):
    info = json.loads((planned / "run.json").read_text())
    (planned / "run.json").write_text(json.dumps(info | {field: value}))
    with pytest.raises(BenchError, match=message) as error:
        read_run(planned)
    assert str(error.value).isprintable()


def test_a_damaged_run_is_not_continued(planned, bench):
    info = json.loads((planned / "run.json").read_text())
    (planned / "run.json").write_text(json.dumps(info | {"models": [1]}))
    with pytest.raises(BenchError, match="models must be an object"):
        run(bench, ["ip2p"], planned, [0], RANDOM, steps=1)


def test_a_damaged_record_is_told(bench, tmp_path):
    out = tmp_path / "run"
    done = run(bench, ["ip2p"], out, [0], RANDOM, steps=1, shard=(3, 3))
    path = done.folder("ip2p", 0, done.items[2].id) / "2.json"
    good = json.loads(path.read_text())
    assert done.outcome("ip2p", 0, done.items[2].id, 2).seconds > 0
    bad = [good | {"seconds": s} for s in ("1", None, float("nan"), 10**400)] + [good | {"error": 1}, [], 5, {}]
    for record in bad:
        path.write_text(json.dumps(record))
        with pytest.raises(BenchError, match="2.json is not the record of an edit"):
            read_run(out).outcome("ip2p", 0, done.items[2].id, 2)
    path.write_text(json.dumps(good | {"error": "a\x1b[2J\nb"}))
    assert read_run(out).outcome("ip2p", 0, done.items[2].id, 2).error == "a?[2J?b"


# ---- the command


def test_torchrun_and_shard_split_the_work():
    assert which_shard(None, {}) == (1, 1)
    assert which_shard(None, {"RANK": "2", "WORLD_SIZE": "4"}) == (3, 4)
    assert which_shard("2/5", {"RANK": "0", "WORLD_SIZE": "1"}) == (2, 5)
    with pytest.raises(BenchError, match="both split the work"):
        which_shard("1/2", {"RANK": "0", "WORLD_SIZE": "2"})
    for text in ("0/2", "3/2", "1", "a/2", "1/b", "1/"):
        with pytest.raises(BenchError, match="give I/N"):
            which_shard(text, {})
    for environ in ({"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"RANK": "-1"}, {"RANK": "\x1b"}):
        with pytest.raises(BenchError, match="as torchrun sets them"):
            which_shard(None, environ)


def run_command(folder, out):
    return ["bench", "run", folder, "--methods", "emilie", "--steps", "1", "--weights", "random", "--device", "cpu",
            "--out", out]  # fmt: skip


def test_the_command_from_making_a_benchmark_to_a_run_in_two_parts(tmp_path, monkeypatch, capsys):
    folder, out = str(tmp_path / "bench"), str(tmp_path / "run")
    assert cli.main(["bench", "make", folder, "--scenes", "2", "--turns", "1"]) == 0
    assert cli.main(["bench", "check", folder]) == 0
    assert "2 items, 2 turns" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, left in (0, "1 edits missing"), (1, "complete"):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(run_command(folder, out)) == 0
        assert left in capsys.readouterr().out
    assert state(read_run(out)) == (0, 0)


def test_a_run_takes_the_config_that_the_command_names(bench, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["bench", "run", str(bench), "--methods", "ip2p", "--weights", "random", "--out", str(out)]
    assert cli.main([*command, "--config", "toy-t2i", "--device", "cpu"]) == 2
    assert "toy-t2i/random takes 4 channels" in capsys.readouterr().err


UNINSTALLED = """
import importlib.metadata, runpy, sys
known = importlib.metadata.version
def version(name):
    if name == "emilie_min":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
sys.argv[0] = "emilie"
runpy.run_module("emilie_min", run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_of_a_clone_that_is_not_installed(tmp_path):
    folder, out = str(tmp_path / "bench"), str(tmp_path / "run")
    data.make(folder, scenes=2, turns=1)
    command = [sys.executable, "-c", UNINSTALLED, *run_command(folder, out)]
    ranks = [
        subprocess.Popen(command, env=os.environ | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"})
        for r in (0, 1)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert state(read_run(out)) == (0, 0)


def test_a_run_needs_no_metadata_of_an_installed_package(bench, tmp_path, monkeypatch):
    def missing(name):
        if name == "emilie_min":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("emilie_min.bench.run.version", missing)
    done = run(bench, ["ip2p"], tmp_path / "run", [0], RANDOM, steps=1, shard=(9, 9))
    assert done.info["versions"]["emilie_min"] == emilie.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "emily"], "no method 'emily'"),
        (["--seeds", "one"], "give whole numbers"),
        (["--shard", "3/2"], "give I/N"),
        (["--steps", "0"], "whole number from 1 to 10000"),
        (["--steps", "10001"], "whole number from 1 to 10000"),
        (["--steps", "x"], "whole number from 1 to 10000"),
        (["--weights", "there_is_none.safetensors"], "no weights at"),
    ],
)
def test_bad_input_is_one_line(arguments, message, bench, tmp_path, capsys):
    code, _, err = command("bench", "run", bench, "--out", tmp_path / "run", *arguments, capsys=capsys)
    assert code == 2 and len(err) == 1 and message in err[0]


@pytest.mark.parametrize("setting", ["guidance", "guidance=", "guidance= , "])
def test_values_to_try_have_a_name(setting, tmp_path, capsys):
    code, _, err = command("bench", "tune", tmp_path / "out", "--setting", setting, capsys=capsys)
    assert code == 2 and len(err) == 1 and "give a name and values" in err[0]


def test_tuning_chooses_by_pictures_right_on_scenes_of_its_own(mine, tmp_path, monkeypatch):
    from emilie_min.bench import tune

    tried = {"strength": ("0", "3"), "steps": ("1",)}
    monkeypatch.setattr(tune, "run", lambda *args: run(*args[:4], RANDOM))
    lines = tune.tune(tmp_path / "out", [str(mine)], tried, scenes=2)
    record = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert record["scenes"] == 2 and list(record["methods"]) == [str(mine)] and len(lines) == 1
    of = record["methods"][str(mine)]
    assert set(of["tried"]) == {"strength=0", "strength=3"} and of["chosen"] in of["tried"]
    assert tune.SEED != 0  # that of every committed benchmark
    with pytest.raises(BenchError, match="has 2 scenes and not 3"):
        tune.tune(tmp_path / "out", [str(mine)], tried, scenes=3)
    with pytest.raises(BenchError, match="nothing to choose"):
        tune.tune(tmp_path / "none", [f"{mine}:strength=1"], {"strength": ("0",)}, scenes=2)


def test_edival_s_harness_gets_a_picture_back(monkeypatch):
    from emilie_min import loading
    from emilie_min.bench.edival import Emilie

    weights = []
    small = emilie.load("random", "toy", device="cpu")
    monkeypatch.setattr(loading, "load", lambda w, device: weights.append(str(w)) or small)
    editor, picture = Emilie(device="cpu"), world.render(world.scene(1))
    made = editor.generate_single_edit(instruction="make it night", current_image=picture, seed=1234)
    assert weights[0].endswith("instruct-pix2pix-00-22000.safetensors") and made.size == picture.size
    assert made.tobytes() == emilie.open(picture, small, seed=1234).edit("make it night").tobytes()
