"""Benchmark folders: what is accepted and refused, the small world's own, and published ones in their own layouts."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emilie_min.bench import data, readers
from emilie_min.bench.data import Item, Turn
from emilie_min.bench.io import open_picture
from emilie_min.errors import BenchError
from emilie_min.toy import world
from emilie_min.toy.evaluate import FIRST
from emilie_min.toy.judge import judge
from emilie_min.toy.train import FIRST_SEED

SCENE = world.scene(7)


def picture(size=(64, 48), colour="red"):
    return Image.new("RGB", size, colour)


def box(size=(64, 48)):
    mask = Image.new("L", size)
    mask.paste(255, (8, 8, 40, 40))
    return mask


def refused(do, *args, **more):
    with pytest.raises(BenchError) as caught:
        do(*args, **more)
    return str(caught.value)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def bench(tmp_path):
    """A folder written by hand: two good items."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    picture().save(tmp_path / "images/a.png")
    box().save(tmp_path / "masks/a.png")
    good = {"id": "a", "image": "images/a.png", "turns": [{"instruction": "make it blue", "mask": "masks/a.png"}]}
    lines(tmp_path, good, good | {"id": "b"})
    return tmp_path


def lines(folder, *records):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    (folder / "bench.jsonl").write_text(text, encoding="utf-8")


def spoil(folder, change):
    """The folder with its second item changed, or replaced by a text."""
    first, second = (json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines())
    lines(folder, first, change if isinstance(change, str) else change(second) or second)


# ---- reading and checking


def test_a_folder_written_by_hand_is_read(bench, monkeypatch):
    items = data.read(bench)
    assert [item.id for item in items] == ["a", "b"]
    assert items[0].image == bench / "images/a.png" and items[0].image.is_absolute()
    assert items[0].turns == (Turn("make it blue", bench / "masks/a.png"),)
    assert data.check(bench) == "2 items, 2 turns, 2 with a mask, 0 with a truth"
    monkeypatch.chdir(bench.parent)  # a relative folder gives absolute paths too
    assert data.read(bench.name) == items


def test_blank_lines_nulls_byte_order_marks_and_strange_separators_do_no_harm(bench):
    record = {"id": "c", "image": "images/../images/a.png", "caption": None, "meta": {"any": [1]}}
    record["turns"] = [{"instruction": "make it\u2028blue", "mask": None, "truth": None}]
    text = "\ufeff\n" + json.dumps(record, ensure_ascii=False) + "\r\n\n"
    (bench / "bench.jsonl").write_bytes(text.encode())
    (item,) = data.read(bench)
    assert item.turns == (Turn("make it\u2028blue"),) and item.image == bench / "images/a.png"
    assert item.caption is None and item.meta == {"any": [1]} and data.check(bench)


def dropped(key):
    return lambda item: item.pop(key) and None


def given(**fields):
    return lambda item: item | fields


def turned(**fields):
    return lambda item: item | {"turns": [item["turns"][0], item["turns"][0] | fields]}


FAULTS = {  # a change to the second line, and what must be said of it
    "{": "not valid JSON (Expecting property name enclosed in double quotes at character 2): one item",
    "[" * 100_000: "not valid JSON",
    "[1, 2]": "it must be an object, not [1, 2]",
    dropped("id"): "lacks 'id'",
    dropped("image"): "lacks 'image'",
    dropped("turns"): "lacks 'turns'",
    given(id="a"): "the id 'a' is that of line 1 too: give each item its own",
    given(id="a/b"): "id must be of letters",
    given(id=".."): "id must be of letters",
    given(id=5): "id must be a text",
    given(image=5): "image must be a text, not 5",
    given(image="images/none.png"): "image: there is no file images/none.png",
    given(image="images"): "image: there is no file images",
    given(image="../outside.png"): "image: '../outside.png' lies outside the folder: copy",
    given(image="images/../../outside.png"): "lies outside the folder",
    given(image="/etc/hostname"): "lies outside the folder",
    given(image="images\\a.png"): 'write the path with "/"',
    given(mask="masks/a.png"): "mask is not known here: choose from id, image, turns, caption, truth, meta",
    given(meta="mine"): "meta must be an object, not 'mine'",
    given(caption=["a"]): "caption must be a text, not ['a']",
    given(turns=[]): "turns is empty",
    given(turns={"instruction": "x"}): "turns must be a list",
    given(turns=["make it blue"]): "turns[0] must be an object, not 'make it blue'",
    given(turns=[{"mask": "masks/a.png"}]): "turns[0] lacks 'instruction'",
    turned(instruction=" "): "turns[1].instruction is empty",
    turned(instruction="\ud800"): "turns[1].instruction: 'utf-8' codec can't encode",
    turned(instruction=3): "turns[1].instruction must be a text, not 3",
    turned(masks="masks/a.png"): "turns[1].masks is not known here: choose from instruction, mask, caption, region",
    turned(mask="masks/none.png"): "turns[1].mask: there is no file masks/none.png",
    turned(region="../masks/a.png"): "turns[1].region: '../masks/a.png' lies outside",
    turned(truth={"ground": "sand"}): "turns[1].truth: is no scene of the small world",
    given(truth="sand"): "truth must be an object",
    given(truth={**SCENE.to_dict(), "ground": "lava"}): "truth: is no scene",
    given(truth={**SCENE.to_dict(), "sky": "blue"}): "truth: is no scene",
    given(truth={**SCENE.to_dict(), "objects": SCENE.to_dict()["objects"][:1] * 2}): "truth: is no scene",
    given(truth=replace(SCENE, style="fog").to_dict()): "truth: is no scene",
    **{
        given(truth=replace(SCENE, objects=(replace(SCENE.objects[0], **wrong),)).to_dict()): "truth: is no scene"
        for wrong in ({"dx": 9}, {"dy": 0.5}, {"shape": "cube"}, {"colour": "beige"})
    },
    given(image="a" * 10**6): "image: there is no file aaa",
    given(image="\x1b[31m.png"): "image: there is no file ?[31m.png",
    given(id="\x1b[31m" * 10**5): "id must be of letters",
    given(**{"\x1b]0;title\x07": 1}): "]0;title? is not known here",
    turned(**{"\x9b2J" * 10**5: 1}): "2J?2J",
}


@pytest.mark.parametrize("change", FAULTS, ids=range(len(FAULTS)))
def test_each_fault_is_named_with_its_line(bench, change):
    spoil(bench, change)
    message = refused(data.read, bench)
    assert message.startswith(f"{bench}/bench.jsonl:2: ") and FAULTS[change] in message
    assert message.isprintable() and len(message) < 800 and refused(data.check, bench) == message


def saved(name, image):
    return lambda folder: image.save(folder / name)


OPENED = {  # a picture spoilt, and what `check` must say
    "image: .* cannot be read as a picture": lambda folder: (folder / "images/a.png").write_bytes(b"\x89PNG"),
    "image: .* too small: 16 px a side at least": saved("images/a.png", picture((8, 8))),
    r"turns.0..mask: .*masks/a.png cannot be read": lambda folder: (folder / "masks/a.png").write_text("no"),
    r"turns.0..mask: the mask .*/masks/.*png has 48x64 px and the picture 64x48: make them the same": saved(
        "masks/a.png", box((48, 64))
    ),
    "turns.0..mask: the mask .*/masks/a.png is empty: white marks": saved("masks/a.png", Image.new("L", (64, 48))),
    "turns.0..mask: nothing is left of the mask: it is fainter": saved("masks/a.png", box().point(lambda v: v // 4)),
}


@pytest.mark.parametrize("fault", OPENED)
def test_check_opens_every_picture_and_mask(bench, fault):
    OPENED[fault](bench)
    assert len(data.read(bench)) == 2  # which opens none
    message = refused(data.check, bench).splitlines()
    assert [f"{bench}/bench.jsonl:{i}" in line for i, line in enumerate(message, 1)] == [True, True]
    with pytest.raises(BenchError, match=fault):
        data.check(bench)


def test_check_opens_regions_and_targets_and_compares_truths_with_the_picture(bench):
    saved("masks/tall.png", box((48, 64)))(bench)
    (bench / "images/broken.png").write_text("no")
    for change, told in (
        (turned(region="masks/tall.png"), f"turns[1].region: the mask {bench}/masks/tall.png has 48x64 px"),
        (turned(target="images/broken.png"), "turns[1].target: "),
        (turned(truth=SCENE.to_dict()), "truth: the picture is 64x48 px and no picture of the small world"),
    ):
        spoil(bench, change)
        assert len(data.read(bench)) == 2
        message = refused(data.check, bench)
        assert message.startswith(f"{bench}/bench.jsonl:2: {told}") and "\n" not in message
        lines(bench, *[json.loads((bench / "bench.jsonl").read_text().splitlines()[0]) | {"id": i} for i in "ab"])


def test_each_lines_first_fault_is_told_up_to_twenty(bench):
    good = json.loads((bench / "bench.jsonl").read_text().splitlines()[0])
    lines(bench, good, "{", good | {"id": "c", "x": 1, "turns": [{"instruction": ""}]}, good | {"id": "d", "y": 2})
    told = refused(data.check, bench).splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in told] == ["2", "3", "4"]
    assert "turns[0].instruction is empty" in told[1] and "y is not known" in told[2]
    lines(bench, *(good | {"id": f"i{i}", "image": "none.png"} for i in range(25)))
    told = refused(data.check, bench).splitlines()
    assert len(told) == 21 and told[-1] == "... and 5 more" and "bench.jsonl:20: " in told[19]


def test_no_benchmark_at_all(tmp_path):
    assert "No such file or directory): a benchmark is a folder with this file" in refused(data.read, tmp_path)
    assert str(tmp_path / "nowhere/bench.jsonl") in refused(data.check, tmp_path / "nowhere")
    (tmp_path / "bench.jsonl").write_text("\n\n")
    assert "has no items" in refused(data.read, tmp_path)
    (tmp_path / "bench.jsonl").write_bytes(b'{"id": "\xff"}')
    assert "is not in UTF-8 (byte 8)" in refused(data.read, tmp_path)


def test_reading_and_checking_need_no_torch(bench):
    code = "import sys, emilie_min.bench.readers, emilie_min.bench.report; from emilie_min.bench import cli, data; "
    code += f"cli.which(None, None, '', ''); data.check({str(bench)!r}); print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == "False"


# ---- writing


def example(tmp_path):
    photo = tmp_path / "photo.JPG"
    picture((64, 48), "green").save(photo)
    turns = (
        Turn("mach es blau, straßenweit", box(), "a blue thing", box(), picture(colour="blue")),
        Turn("make it red again"),
    )
    return [
        Item("in-memory_1.0", picture(), turns, "a red thing", meta={"from": ["me", 1]}),
        Item("file", photo, (Turn("make it blue", tmp_path / "mask.png"),)),
        Item("toy", world.render(SCENE), (Turn("make it night", truth=replace(SCENE, style="night")),), truth=SCENE),
    ]


def test_what_was_written_is_read_back(tmp_path):
    box().save(tmp_path / "mask.png")
    items = example(tmp_path)
    assert data.write(tmp_path / "out", iter(items)) == "3 items, 4 turns, 2 with a mask, 1 with a truth"
    first, second, third = data.read(tmp_path / "out")
    assert (first.id, first.caption, first.meta) == ("in-memory_1.0", "a red thing", {"from": ["me", 1]})
    edit = first.turns[0]
    assert (edit.instruction, edit.caption, edit.truth) == ("mach es blau, straßenweit", "a blue thing", None)
    for path, image in ((first.image, picture()), (edit.mask, box()), (edit.region, box())):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert Image.open(edit.target).getpixel((0, 0)) == (0, 0, 255)
    assert first.turns[1] == Turn("make it red again")
    assert second.image.name == "file.jpg" and second.image.read_bytes() == (tmp_path / "photo.JPG").read_bytes()
    assert (third.truth, third.turns[0].truth) == (SCENE, replace(SCENE, style="night"))
    data.write(tmp_path / "again", data.read(tmp_path / "out"))
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert "straßenweit" in (tmp_path / "out/bench.jsonl").read_text(encoding="utf-8")


def interrupted(tmp_path):
    yield example(tmp_path)[0]
    raise KeyboardInterrupt


def test_nothing_half_written_remains(tmp_path):
    items = example(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert "mask.png" in refused(data.write, tmp_path / "out", items)  # item 2's mask is missing
    small = replace(items[0], turns=(Turn("x", box((32, 32))),))
    message = refused(data.write, tmp_path / "out", [small])  # found by the check of the whole
    assert f"{tmp_path}/out/bench.jsonl:1: turns[0].mask: the mask {tmp_path}/out/masks/" in message
    assert "line 1 too" in refused(data.write, tmp_path / "out", [items[0], items[0]])
    assert "an id must be of letters" in refused(data.write, tmp_path / "out", [replace(items[0], id="../up")])
    assert "there is no item to put into it" in refused(data.write, tmp_path / "out", [])
    with pytest.raises(BenchError) as told:
        data.write(tmp_path / "out", [small, replace(small, id="second")])
    assert [line.partition(": ")[0] for line in told.value.lines] == [f"{tmp_path}/out/bench.jsonl:{n}" for n in (1, 2)]
    assert "cannot be written" in refused(data.write, tmp_path / "out", [replace(items[0], meta={"by": "\ud800"})])
    with pytest.raises(KeyboardInterrupt):
        data.write(tmp_path / "out", interrupted(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_written_over(tmp_path):
    items = example(tmp_path)[:1]
    (tmp_path / "empty").mkdir()
    assert data.write(tmp_path / "empty", items)
    before = contents(tmp_path)
    assert "is there already: remove it or name another" in refused(data.write, tmp_path / "empty", items)
    assert "is there already" in refused(data.write, tmp_path / "photo.JPG", items)
    assert f"there is no folder {tmp_path}/no" in refused(data.write, tmp_path / "no/out", items)
    assert contents(tmp_path) == before


# ---- the small world's benchmarks


@pytest.fixture(scope="module")
def imie(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "imie"
    data.make(folder)
    return folder


def in_order(item):
    """Each turn of an item with the scene before it."""
    return zip((item.truth, *(turn.truth for turn in item.turns)), item.turns)


def test_imie_is_forty_chains_of_four_whose_truths_the_judge_accepts(imie):
    items = data.read(imie)
    assert len(items) == 40 and {len(item.turns) for item in items} == {4}
    assert data.check(imie).startswith("40 items, 160 turns, ") and data.check(imie).endswith(", 160 with a truth")
    texts = set(world.instructions())
    for item in items:
        assert np.array_equal(np.asarray(Image.open(item.image)), world.pixels(item.truth))
        assert item.caption == world.caption(item.truth)
        for (before, turn), kind in zip(in_order(item), item.meta["kinds"], strict=True):
            assert turn.instruction in texts and turn.caption == world.caption(turn.truth) and turn.target is None
            if item.id < "0011":
                assert judge(world.render(turn.truth), turn.truth, before).correct
                assert not judge(world.render(before), turn.truth).correct
            assert (turn.region is None) == (kind in ("background", "style"))
            objects = turn.truth.objects
            for part in ("shape", "colour", "place"):
                assert len({getattr(o, part) for o in objects}) == len(objects)
            assert not {(o.colour, o.shape) for o in objects} & set(world.HELD_OUT)


def test_imie_starts_with_every_kind_in_turn_and_masks_about_half_of_the_local_edits(imie):
    items = data.read(imie)
    assert [item.meta["kinds"][0] for item in items] == [world.KINDS[i % 6] for i in range(40)]
    kinds = [kind for item in items for kind in item.meta["kinds"]]
    assert all(kinds.count(kind) >= 15 for kind in world.KINDS)
    local = [turn for item in items for turn in item.turns if turn.region]
    masked = [turn for turn in local if turn.mask]
    assert 0.35 < len(masked) / len(local) < 0.65
    assert sum(turn.mask is not None for item in items for turn in item.turns) == len(masked)
    assert all(turn.mask.read_bytes() == turn.region.read_bytes() for turn in masked)


def outside(turn, before):
    """Whether anything outside a turn's region differs between the pictures before and after, as they should be."""
    region = np.asarray(Image.open(turn.region)) > 0
    changed = (world.pixels(before) != world.pixels(turn.truth)).any(-1)
    assert region.sum() == 32 * 32 and changed[region].any()
    return changed[~region].any()


def test_an_imie_region_holds_all_that_its_edit_changes(imie):
    for item in data.read(imie):
        assert not any(outside(turn, before) for before, turn in in_order(item) if turn.region)


def test_drift_changes_one_object_and_back_and_nothing_else_for_sixteen_turns(tmp_path):
    assert data.make(tmp_path / "out", 6, kind="drift") == "6 items, 96 turns, 0 with a mask, 96 with a truth"
    places = set()
    for item in data.read(tmp_path / "out"):
        places.add(item.meta["place"])
        texts = set(world.instructions())
        for i, (before, turn) in enumerate(in_order(item), 1):
            assert turn.instruction in texts and turn.mask is None and turn.truth != before
            assert np.array_equal(Image.open(turn.region), world.mask(item.meta["place"]))
            assert not outside(turn, before)
            assert (turn.truth == item.truth) == (i % 2 == 0)
            (old,), (new,) = (
                set(before.objects) - set(turn.truth.objects),
                set(turn.truth.objects) - set(before.objects),
            )
            assert old.place == new.place == item.meta["place"]
            assert (new.colour, new.shape) not in world.HELD_OUT
            assert f"the {old.shape}" in turn.instruction or f"the {old.colour} {old.shape}" in turn.instruction
        assert judge(world.render(turn.truth), item.truth).correct
    assert len(places) > 1


@pytest.mark.parametrize("kind", data.KINDS)
def test_the_same_call_writes_the_same_bytes(kind, tmp_path):
    more = data.KINDS[kind] + (kind != "night-here")
    for name, call in {"here": (2, None, 1), "again": (2, None, 1), "more": (3, more, 1)}.items():
        data.make(tmp_path / name, *call, kind)
    here = contents(tmp_path / "here")
    assert here == contents(tmp_path / "again") and len(here) > 2
    for item, more in zip(data.read(tmp_path / "here"), data.read(tmp_path / "more")):  # a longer one begins the same
        assert [t.instruction for t in more.turns][: len(item.turns)] == [t.instruction for t in item.turns]
    data.make(tmp_path / "other", 2, seed=2, kind=kind)
    assert here["images/0001.png"] != (tmp_path / "other/images/0001.png").read_bytes()


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path):
    call = (
        "import sys; from emilie_min.bench import data\nfor k in data.KINDS: data.make(sys.argv[1] + k, 3, None, 1, k)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path), "PYTHONHASHSEED": "5"}
    subprocess.run([sys.executable, "-c", call, f"{tmp_path}/there "], check=True, env=env)
    for kind in data.KINDS:
        data.make(tmp_path / kind, 3, seed=1, kind=kind)
        assert contents(tmp_path / kind) == contents(tmp_path / f"there {kind}")


def test_no_scene_of_training_or_of_toy_eval_is_used(tmp_path):
    seeds = set()
    for seed in (0, 1, 99799):
        data.make(tmp_path / str(seed), 2, turns=1, seed=seed)
        scenes = [item.meta["scene"] for item in data.read(tmp_path / str(seed))]
        assert [item.truth for item in data.read(tmp_path / str(seed))] == [world.scene(n) for n in scenes]
        seeds |= set(scenes)
    assert len(seeds) == 6 and FIRST + 10**6 <= min(seeds) and max(seeds) + data.SCENES <= FIRST_SEED + 2


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"kind": "imi"}, "choose from imie, drift"),
        ({"scenes": 0}, "1 to 10000 scenes"),
        ({"scenes": 10001}, "1 to 10000 scenes"),
        ({"turns": 0}, "1 turn or more"),
        ({"seed": -1}, "from 0 to 99799, not -1"),
        ({"seed": 99800}, "from 0 to 99799"),
    ],
)
def test_impossible_benchmarks_are_refused(tmp_path, wrong, why):
    assert why in refused(data.make, tmp_path / "out", **wrong)
    assert not any(tmp_path.iterdir())


# ---- EditBench


@pytest.fixture
def editbench(tmp_path):
    source = tmp_path / "editbench"
    for part in readers.PARTS:
        with open(tmp_path / "table.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["aos", "object", "prompt_full", "prompt_mask-simple", "prompt_mask-rich"])
            rows.writerow(
                [f"color {part}", "cat", "a metal cat, asleep,\non a farm", "a metal cat", "a small metal cat"]
            )
        for folder in ("references", "masks"):
            (source / f"{folder}_{part}").mkdir(parents=True)
        (tmp_path / "table.csv").rename(source / f"annotations_{part}.csv")
        picture().save(source / f"references_{part}/color {part}.png")
        box().save(source / f"masks_{part}/color {part}.png")
    return source


def test_what_is_longer_than_any_benchmark_is_not_read(bench, tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**28 + 1)
    (tmp_path / "huge").replace(bench / "bench.jsonl")
    with pytest.raises(BenchError, match="longer than 256 MB"):
        data.read(bench)


@pytest.mark.parametrize("polarity", readers.POLARITIES)
def test_editbench_is_read_with_the_polarity_that_is_given(tmp_path, editbench, polarity):
    out = tmp_path / "out"
    summary = readers.import_("editbench", editbench, out, polarity=polarity)
    assert summary == "2 items, 2 turns, 2 with a mask, 0 with a truth"
    natural, generated = data.read(out)
    assert (natural.id, generated.id) == ("natural_color_natural", "generated_color_generated")
    assert natural.image.read_bytes() == (editbench / "references_natural/color natural.png").read_bytes()
    (turn,) = natural.turns
    assert (turn.instruction, turn.caption) == ("a small metal cat", "a metal cat, asleep,\non a farm")
    white = np.asarray(Image.open(turn.mask)) == 255
    assert white[20, 20] == (polarity == "white-is-edit") and white[0, 0] == (polarity == "black-is-edit")


def test_editbench_prompts_and_parts_are_a_choice(editbench):
    for prompt, text in (("mask-simple", "a metal cat"), ("full", "a metal cat, asleep,\non a farm")):
        (item,) = readers.read_editbench(editbench, "white-is-edit", ("generated",), prompt)
        assert item.turns[0].instruction == text and item.id.startswith("generated")


def test_editbench_faults(tmp_path, editbench):
    def told(**options):
        return refused(readers.import_, "editbench", editbench, tmp_path / "out", **options)

    white = {"polarity": "white-is-edit"}
    assert told(polarity=None).endswith("--polarity white-is-edit or black-is-edit")
    assert "--polarity white-is-edit or black-is-edit, not 'auto'" in told(polarity="auto")
    assert "prompt must be one of mask-simple, mask-rich, full" in told(**white, prompt="rich")
    assert "which must be of natural, generated, not photos" in told(**white, which=("photos",))
    box((32, 32)).save(editbench / "masks_generated/color generated.png")
    assert "annotations_generated.csv:3: the mask is 32x32 px and the picture 64x48 px" in told(**white)
    (editbench / "masks_generated/color generated.png").write_text("no")
    assert "masks_generated/color generated.png cannot be read as a picture" in told(**white)
    (editbench / "references_generated/color generated.png").unlink()
    assert "annotations_generated.csv:3: there is no file references_generated/color" in told(**white)
    table = editbench / "annotations_generated.csv"
    table.write_text("aos,prompt_full,prompt_mask-rich\n../../up,x,y\n")
    assert "annotations_generated.csv:2: 'references_generated/../../up.png' lies outside" in told(**white)
    table.write_text("aos,prompt_full,prompt_mask-rich\ncolor,x\n")
    assert "annotations_generated.csv:2: prompt_mask-rich is empty" in told(**white)
    table.write_text("aos,prompt\x1b[2J\n")
    assert "annotations_generated.csv has no column 'prompt_full', but: aos, prompt?[2J" in told(**white)
    table.write_bytes(b"\xff\xfe\x00")
    assert "is no table in UTF-8" in told(**white)
    table.unlink()
    assert "annotations_generated.csv cannot be read (No such file or directory): give the folder" in told(**white)
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["editbench"]
    assert "choose from editbench, magicbrush, piebench" in refused(
        readers.import_, "coco", editbench, tmp_path / "out"
    )


@pytest.mark.parametrize("kind", ["EPS", "PDF"])
def test_a_picture_of_another_format_is_not_even_tried(kind, tmp_path):
    picture().save(tmp_path / "p.png", kind)
    with pytest.raises(BenchError, match="p.png cannot be read as a picture"):
        open_picture(tmp_path / "p.png")


# ---- MagicBrush


def erased(size=(64, 48), where=(8, 8, 40, 40)):
    """A picture whose edited part is transparent; it is white elsewhere, so that grey values mislead."""
    image = Image.new("RGBA", size, (255, 255, 255, 255))
    image.paste((0, 0, 0, 0), where)
    return image


@pytest.fixture
def magicbrush(tmp_path):
    source = tmp_path / "dev"
    sessions = {"139306": 2, "242679": 1}
    for name, n in sessions.items():
        folder = source / "images" / name
        folder.mkdir(parents=True)
        picture().save(folder / f"{name}-input.png")
        for i in range(1, n + 1):
            picture(colour=("blue", "green")[i - 1]).save(folder / f"{name}-output{i}.png")
            erased().save(folder / f"{name}-mask{i}.png")
    erased((128, 96), (16, 16, 80, 80)).save(source / "images/139306/139306-mask2.png")  # at times of another size

    def edit(name, i):
        before = f"{name}-output{i - 1}.png" if i > 1 else f"{name}-input.png"
        files = {"input": before, "mask": f"{name}-mask{i}.png", "output": f"{name}-output{i}.png"}
        return files | {"instruction": f"do {name} {i}"}

    annotations = {name: [edit(name, i) for i in range(1, n + 1)] for name, n in sessions.items()}
    (source / "edit_sessions.json").write_text(json.dumps(annotations))
    captions = {"139306": {"139306-input.png": "a seat", "139306-output1.png": "a cat on a seat"}}
    (source / "global_descriptions.json").write_text(json.dumps(captions))
    return source


def test_magicbrush_sessions_become_chains_with_regions_from_the_alpha_channel(tmp_path, magicbrush):
    assert readers.import_("magicbrush", magicbrush, tmp_path / "out").startswith("2 items, 3 turns, 0 with a mask")
    first, second = data.read(tmp_path / "out")
    assert (first.id, first.caption, second.id, second.caption) == ("139306", "a seat", "242679", None)
    assert [turn.instruction for turn in first.turns] == ["do 139306 1", "do 139306 2"]
    assert [turn.caption for turn in first.turns] == ["a cat on a seat", None]
    assert [Image.open(turn.target).getpixel((0, 0)) for turn in first.turns] == [(0, 0, 255), (0, 128, 0)]
    for turn in first.turns:
        assert turn.mask is None and np.array_equal(Image.open(turn.region), box())
    (magicbrush / "global_descriptions.json").unlink()
    readers.import_("magicbrush", magicbrush, tmp_path / "masked", masks=True)
    (turn, _) = data.read(tmp_path / "masked")[0].turns
    assert turn.mask.read_bytes() == turn.region.read_bytes() and turn.caption is None


def test_a_magicbrush_edit_of_another_picture_begins_a_new_chain(magicbrush):
    path = magicbrush / "edit_sessions.json"
    path.write_text(path.read_text().replace('"input": "139306-output1.png"', '"input": "139306-input.png"'))
    items = list(readers.read_magicbrush(magicbrush))
    assert [(item.id, len(item.turns)) for item in items] == [("139306", 1), ("139306_2", 1), ("242679", 1)]
    assert items[1].image.name == "139306-input.png" and items[1].turns[0].instruction == "do 139306 2"


def test_magicbrush_faults(tmp_path, magicbrush):
    def told():
        message = refused(readers.import_, "magicbrush", magicbrush, tmp_path / "out")
        assert message.isprintable() and len(message) < 800
        return message

    path, mask = magicbrush / "edit_sessions.json", magicbrush / "images/242679/242679-mask1.png"
    box().save(mask)
    assert "242679-mask1.png has no transparency, by which MagicBrush's masks mark" in told()
    mask.unlink()
    assert f"{path}: session '242679', edit 1: there is no file images/242679/242679-mask1.png" in told()
    path.write_text(json.dumps({"1": [{"input": "\x1b[2J" * 10**5, "mask": "b", "output": "c", "instruction": "d"}]}))
    assert "session '1', edit 1: there is no file" in told()
    path.write_text('{"1": [{"input": "a", "mask": "b", "output": "c"}]}')
    assert "['1'][0] lacks 'instruction'" in told()
    path.write_text('{"1": [{"input": "a", "mask": "b", "output": "c", "instruction": " "}]}')
    assert "['1'][0].instruction is empty" in told()
    path.write_text('{"1\\u001b[2J": {"a": 1}}')
    assert "['1\\x1b[2J'] must be a list, not {'a': 1}" in told()
    for text in ("[]", "{}", '{"1": []}'):
        path.write_text(text)
        assert "is empty" in told()
    path.write_text("{")
    assert "edit_sessions.json cannot be read as MagicBrush's sessions (not valid JSON" in told()
    path.unlink()
    assert "edit_sessions.json cannot be read as MagicBrush's sessions (No such file or directory)" in told()
    assert not (tmp_path / "out").exists()


# ---- PIE-Bench


@pytest.fixture
def piebench(tmp_path):
    source = tmp_path / "pie"
    folder = source / "annotation_images/0_random_140"
    folder.mkdir(parents=True)
    picture((512, 512)).save(folder / "000000000000.jpg")

    def write(mask, **more):
        entry = {
            "image_path": "0_random_140/000000000000.jpg",
            "original_prompt": "a slanted bicycle on the road",
            "editing_prompt": "a slanted [rusty] bicycle on the road",
            "editing_instruction": "Make the frame of the bike rusty",
            "editing_type_id": "0",
            "blended_word": "bicycle bicycle",
            "mask": mask,
        }
        (source / "mapping_file.json").write_text(json.dumps({"000000000000": entry | more}))
        return source

    return write


def runs(rows, columns):
    """A box as PIE-Bench has it: start and length of the run in each row, counted along rows of 512."""
    return [n for y in rows for n in (512 * y + columns[0], len(columns))]


def test_piebench_runs_become_the_mask_and_with_a_border_the_region(tmp_path, piebench):
    source = piebench(runs(range(100, 200), range(30, 80)))
    readers.import_("piebench", source, tmp_path / "out", masks=True)
    (item,) = data.read(tmp_path / "out")
    assert (item.id, item.caption) == ("000000000000", "a slanted bicycle on the road")
    assert item.meta == {"from": "PIE-Bench", "editing_type_id": "0", "blended_word": "bicycle bicycle"}
    (turn,) = item.turns
    assert (turn.instruction, turn.caption) == (
        "Make the frame of the bike rusty",
        "a slanted rusty bicycle on the road",
    )
    wanted = Image.new("L", (512, 512))
    wanted.paste(255, (30, 100, 80, 200))  # x before y: it is not the mask's transpose
    assert np.array_equal(Image.open(turn.mask), wanted)
    wanted = np.pad(np.asarray(wanted)[1:-1, 1:-1], 1, constant_values=255)
    assert np.array_equal(Image.open(turn.region), wanted)
    readers.import_("piebench", source, tmp_path / "unmasked")
    (turn,) = data.read(tmp_path / "unmasked")[0].turns
    assert turn.mask is None and np.array_equal(Image.open(turn.region), wanted)


@pytest.mark.parametrize(
    "mask, pixels",
    [
        ([0, 3], {0, 1, 2}),
        ([511, 2], {511, 512}),  # from one row into the next
        ([512 * 512 - 2, 100], {512 * 512 - 2, 512 * 512 - 1}),  # past the end: cut
        ([5, 0, 9, 1], {9}),
        ([7, 2, 8, 2], {7, 8, 9}),  # overlapping
        ([], set()),
    ],
)
def test_piebench_runs_one_by_one(mask, pixels):
    assert set(np.flatnonzero(readers._runs(mask))) == pixels


def test_a_piebench_edit_of_the_whole_picture_has_neither_mask_nor_region(piebench):
    for mask in ([0, 512 * 512], runs(range(1, 511), range(1, 511))):
        (item,) = readers.read_piebench(piebench(mask), masks=True)
        assert item.turns[0].mask is item.turns[0].region is None


def test_piebench_faults(tmp_path, piebench):
    def told(*args, **more):
        return refused(readers.import_, "piebench", piebench(*args, **more), tmp_path / "out")

    for mask in ([1], [1, 2.0], [-1, 2], [True, 1], [[], 1]):
        assert "mapping_file.json: '000000000000': \"mask\" must be a list of pairs of whole numbers" in told(mask)
    for mask in ("1 2", None):
        assert "['000000000000'].mask must be a list, not" in told(mask)
    assert "['000000000000'].editing_instruction is empty" in told([], editing_instruction="")
    assert "there is no file" in told([], image_path="none.jpg")
    assert "lies outside the folder" in told([], image_path="../../../up.jpg")
    picture((640, 512)).save(tmp_path / "pie/annotation_images/wide.jpg")
    assert "wide.jpg is 640x512 px, but PIE-Bench's masks are over 512x512 px" in told([], image_path="wide.jpg")
    (tmp_path / "pie/mapping_file.json").unlink()
    assert "mapping_file.json cannot be read" in refused(
        readers.import_, "piebench", tmp_path / "pie", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


# ---- the further kinds of the small world


def made(tmp_path, kind, scenes=10, **more):
    data.make(tmp_path / kind, scenes=scenes, kind=kind, **more)
    return data.read(tmp_path / kind)


def test_twins_are_told_apart_by_the_mask_alone(tmp_path):
    for item in made(tmp_path, "twins"):
        (turn,) = item.turns
        names = [(o.shape, o.colour) for o in item.truth.objects]
        twin = next(name for name in names if names.count(name) == 2)
        assert twin[0] in turn.instruction and turn.mask is not None
        changed = set(item.truth.objects) ^ set(turn.truth.objects)
        place = {o.place for o in changed}
        assert len(place) == 1 and twin in {(o.shape, o.colour) for o in changed}
        assert Image.open(turn.mask).tobytes() == world.mask(place.pop()).tobytes()


def test_night_here_is_right_where_the_mask_is_and_the_picture_before_elsewhere(tmp_path):
    shares = set()
    for item in made(tmp_path, "night-here", scenes=16):
        (turn,) = item.turns
        part = np.asarray(Image.open(turn.mask)) > 0
        pictures = Image.open(turn.target), world.render(turn.truth), Image.open(item.image)
        target, after, before = map(np.asarray, pictures)
        assert turn.within and (target[part] == after[part]).all() and (target[~part] == before[~part]).all()
        shares.add(part.mean())
    assert shares == {0.25, 0.5}
    with pytest.raises(BenchError, match="one turn"):
        data.make(tmp_path / "two", kind="night-here", turns=2)


def test_undo_comes_back_to_the_first_scene_in_words(tmp_path):
    for item in made(tmp_path, "undo", turns=4):
        assert [turn.truth == item.truth for turn in item.turns] == [False, True, False, True]
        assert all(turn.mask is None for turn in item.turns)
    assert {item.meta["kinds"][0] for item in data.read(tmp_path / "undo")} == {*world.KINDS} - {"remove"}


def test_nothing_is_asked_for_only_where_the_item_says_so(tmp_path):
    items = made(tmp_path, "nothing", scenes=2, turns=3)
    assert [turn.instruction for turn in items[0].turns] == ["", "", ""] and items[0].turns[2].truth == items[0].truth
    path = tmp_path / "nothing" / "bench.jsonl"
    path.write_text(path.read_text().replace('"asks": "nothing"', '"asks": "little"'))
    with pytest.raises(BenchError, match="instruction is empty"):
        data.read(tmp_path / "nothing")


# ---- EdiVal


@pytest.fixture
def edival(tmp_path):
    source = tmp_path / "edival"
    (source / "input_images_resize_512").mkdir(parents=True)
    for name in ("7_input_raw.jpg", "9_input_raw.png"):
        Image.new("RGB", (512, 512), "teal").save(source / "input_images_resize_512" / name)
    rows = [
        "image_index,turns,instructions",
        "7,3,\"['Add a cat, white', \"\"Remove 'it'\"\", 'Make it night']\"",
        "7,1,['Add a cat']",
        "9,3,\"['a', 'b', 'c']\"",
    ]
    (source / "oai_instruction_generation_output.csv").write_text("\n".join(rows) + "\n")
    return source


def test_edival_s_rows_of_three_turns(edival, tmp_path):
    assert readers.import_("edival", edival, tmp_path / "out") == "2 items, 6 turns, 0 with a mask, 0 with a truth"
    first, second = data.read(tmp_path / "out")
    assert (first.id, second.id) == ("7", "9") and Image.open(first.image).size == (512, 512)
    assert [turn.instruction for turn in first.turns] == ["Add a cat, white", "Remove 'it'", "Make it night"]


@pytest.mark.parametrize(
    "old, new, told",
    [("'b', 'c'", "'b'", "list of 3 texts"), ("'b', 'c'", "'b', ''", "list of 3 texts"), ("9,3", "8,3", "no file"),
     ("['a', 'b', 'c']", "__import__('os')", "list of 3 texts"), ("turns", "rounds", "no column 'turns'")],
)  # fmt: skip
def test_what_is_wrong_with_edival_s_table_is_told_by_line(edival, tmp_path, old, new, told):
    path = edival / "oai_instruction_generation_output.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BenchError, match=told):
        readers.import_("edival", edival, tmp_path / "out")


def test_undone_later_the_others_stay(tmp_path):
    data.make(tmp_path / "b", scenes=20, kind="undo-later")
    items = data.read(tmp_path / "b")
    assert [len(item.turns) for item in items] == [2] * 5 + [3] * 5 + [4] * 5 + [5] * 5
    for item in items:
        first, *_, before, last = (item.truth, *(turn.truth for turn in item.turns))
        changed = world.parts(first, item.turns[0].truth)
        assert all(not world.parts(last, first).get(part) for part in changed)  # as at first there
        assert world.parts(before, last).keys() == changed.keys()  # and nothing else is undone
    assert all(item.turns[1].truth == item.truth for item in items[:5])
