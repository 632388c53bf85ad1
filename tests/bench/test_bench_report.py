"""Reports and preference studies of a small run whose every number can be worked out by hand."""

import base64
import csv
import hashlib
import io
import itertools
import json
import math
import re
import shutil
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emilie_min.app import cli
from emilie_min.bench import data, metrics
from emilie_min.bench import report as reporting
from emilie_min.bench.page import Table, Value, evenly_spaced
from emilie_min.bench.report import Figure, Results, measure, report
from emilie_min.bench.run import read_run, slug
from emilie_min.bench.study import NO_DIFFERENCE, study, tally
from emilie_min.errors import BenchError
from emilie_min.toy import world

EMILIE, IP2P, GATE = "emilie", "ip2p", "emilie:gate=eq8"
SEEDS = (0, 1)
NO_SCORERS = {"clip": None, "blip": None, "lpips": False}
NASTY = 'make the square <script>alert("x")</script> & `blue`'
SETTINGS = {
    EMILIE: {"gate": "anchor", "steps": None},
    IP2P: {"pixels": "truncate"},
    GATE: {"gate": "eq8", "steps": None},
}


def scenes():
    """Three chains of two edits, each in a place of its own: recolour the circle, then the square."""
    for i, ground in enumerate(("grass", "stone", "water")):
        red, yellow = world.Object("circle", "red", "top left", i), world.Object("square", "yellow", "bottom right")
        blue, green = world.Object("circle", "blue", "top left", i), world.Object("square", "green", "bottom right")
        yield [world.Scene(ground, "day", things) for things in ((red, yellow), (blue, yellow), (blue, green))]


def picture(method, item, turn, chain):
    """emilie: all right, but the last chain's second edit is not made. ip2p: right, 3 grey levels brighter each turn.
    The eq8 gate: no edit is made at all."""
    if method == GATE or (method == EMILIE and item == 2 and turn == 2):
        return world.render(chain[0 if method == GATE else 1])
    return Image.fromarray(world.pixels(chain[turn]) + np.uint8(3 * turn if method == IP2P else 0))


def fabricate(folder):
    """A run of three methods and two seeds. ip2p fails at turn 2 of the first chain under seed 1; the last edit of
    the eq8 gate has not been run."""
    items = []
    for i, chain in enumerate(scenes()):
        texts = ["make the circle blue", NASTY if i == 1 else "make the square green"]
        masks = [world.mask(place) for place in ("top left", "bottom right")]
        turns = [
            data.Turn(text, mask if i != 2 else None, world.caption(after), mask, truth=after)
            for text, mask, after in zip(texts, masks, chain[1:])
        ]
        items.append(data.Item(f"{i + 1:04d}", world.render(chain[0]), tuple(turns), world.caption(chain[0]), chain[0]))
    data.write(folder / "bench", items)
    run = folder / "run"
    for method in SETTINGS:
        for seed in SEEDS:
            for i, chain in enumerate(scenes()):
                at = run / "edits" / slug(method) / str(seed) / f"{i + 1:04d}"
                at.mkdir(parents=True)
                world.render(chain[0]).save(at / "0.png")
                for turn in (1, 2):
                    if (method, seed, i, turn) == (GATE, 1, 2, 2):
                        continue
                    error = "the sampled latent is not finite" if (method, seed, i, turn) == (IP2P, 1, 0, 2) else None
                    if not error:
                        picture(method, i, turn, chain).save(at / f"{turn}.png")
                    if method != IP2P and i != 2:
                        world.mask(("top left", "bottom right")[turn - 1]).save(at / f"{turn}_mask.png")
                    record = {"instruction": "", "seconds": turn + 0.5 * i, "notes": {}, "error": error}
                    (at / f"{turn}.json").write_text(json.dumps(record))
    info = {
        "bench": str(folder / "bench"),
        "bench_sha256": hashlib.sha256((folder / "bench" / "bench.jsonl").read_bytes()).hexdigest(),
        "methods": {
            m: {"class": m.split(":")[0].title(), "needs": "instructions", "settings": s} for m, s in SETTINGS.items()
        },
        "seeds": list(SEEDS),
        "models": {"instructions": {"name": "toy.safetensors", "sha256": "ab" * 32}},
        "versions": {"emilie_min": "0.1.0", "torch": "2.13"},
        "device": "cpu",
        "dtype": "float32",
        "steps": None,
        "prompt": None,
    }
    (run / "run.json").write_text(json.dumps(info))
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run and its report; not to be changed."""
    folder = fabricate(tmp_path_factory.mktemp("fabricated"))
    report(read_run(folder))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """The same run, measured already, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "run"))


def measured(folder):
    return Results(read_run(folder), measure(read_run(folder), NO_SCORERS, "cpu"))


def table(folder, title):
    """A table of the report as {row: {column: cell}}, its numbers as they are before they are rounded."""
    results = measured(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "curves", no_curves)
        makers = (reporting.how_good, reporting.against_the_first, reporting.by_turn, reporting.timing)
        sections = [make(results) for make in makers] + [reporting.what_was_run(results, {})]
    [found] = [part for s in sections for part in s.parts if isinstance(part, Table) and part.title == title]
    return {row[0]: dict(zip(found.columns, row)) for row in found.rows}


def edits(folder):
    return list(csv.DictReader(io.StringIO((folder / "report" / "metrics.csv").read_text())))


def limits(means):
    """The interval that ever more draws from these would lead to."""
    return np.percentile(np.repeat(means, 1000), (2.5, 97.5))


def counting(monkeypatch):
    """A list to which each call of `measure_turn` adds."""
    calls, measure = [], metrics.measure_turn
    monkeypatch.setattr(metrics, "measure_turn", lambda *a, **k: calls.append(a) or measure(*a, **k))
    return calls


def no_curves(*_):
    """In the place of figures, which take their time."""
    return Figure("none", "", "")


# ---- numbers


def test_the_run_is_what_it_is_meant_to_be(folder):
    rows = {(e["method"], e["seed"], e["item"], e["turn"]): e for e in edits(folder)}
    assert len(rows) == 3 * 2 * 3 * 2
    failed, missing = rows[IP2P, "1", "0001", "2"], rows[GATE, "1", "0003", "2"]
    assert failed["state"] == "failed" and failed["error"] == "the sampled latent is not finite"
    assert failed["correct"] == failed["chain"] == "0" and not failed["psnr_first"]
    assert missing["state"] == "missing" and not any(missing[name] for name in ("correct", "kept", "psnr_first"))
    assert sum(e["state"] == "done" for e in rows.values()) == 34
    assert rows[EMILIE, "0", "0002", "2"]["instruction"] == NASTY


def test_shares_of_right_pictures(folder):
    share = table(folder, "Right or wrong")
    correct, whole, kept = ([share[m][f"{name} ↑"].mean for m in SETTINGS] for name in
                            ("correct", "whole chain correct", "kept"))  # fmt: skip
    assert correct == pytest.approx([(1 + 1 + 1 / 2) / 3, (3 / 4 + 1 + 1) / 3, 0])
    assert whole == pytest.approx([2 / 3, (1 / 2 + 1 + 1) / 3, 0])
    assert kept == pytest.approx([1, 11 / 12, (1 / 2 + 1 / 2 + 2 / 3) / 3])
    by_turn = table(folder, "All pictures right up to a turn")
    assert [by_turn[EMILIE][f"turn {n}"].mean for n in (1, 2)] == pytest.approx([1, 2 / 3])
    assert [by_turn[IP2P][f"turn {n}"].mean for n in (1, 2)] == pytest.approx([1, 5 / 6])


def test_one_wrong_picture_spoils_the_chain_and_one_error_ends_it(copy, monkeypatch):
    monkeypatch.setattr("emilie_min.bench.report.curves", no_curves)
    wrong, ended = (copy / "edits" / method / "1" / "0001" for method in (EMILIE, IP2P))
    shutil.copy(wrong / "0.png", wrong / "1.png")
    (ended / "2.json").unlink()
    (ended / "1.json").write_text(json.dumps({"seconds": 1.0, "notes": {}, "error": "out of memory"}))
    report(read_run(copy), grids=0)
    rows = {(e["method"], e["turn"]): e for e in edits(copy) if (e["seed"], e["item"]) == ("1", "0001")}
    assert [(rows[EMILIE, n]["correct"], rows[EMILIE, n]["chain"]) for n in "12"] == [("0", "0"), ("1", "0")]
    assert [(rows[IP2P, n]["state"], rows[IP2P, n]["correct"]) for n in "12"] == [("failed", "0")] * 2


def test_pictures_that_grow_brighter_by_3_levels_a_turn(folder):
    row, steady = (table(folder, "Pixels")[m] for m in (IP2P, EMILIE))
    assert row["PSNR outside, dB ↑"].mean == pytest.approx(20 * math.log10(255 / 3), abs=1e-3)
    assert row["L1 to first, grey levels ↓"].mean == pytest.approx(((3 + 6 + 3) / 3 + 4.5 + 4.5) / 3, abs=1e-4)
    assert steady["PSNR outside, dB ↑"].mean == metrics.PSNR_CAP and steady["L1 to first, grey levels ↓"].mean == 0
    drift = table(folder, "PSNR to first, by turn")[IP2P]
    assert drift["turn 2"].mean == pytest.approx(20 * math.log10(255 / 6), abs=1e-3)


def test_means_and_intervals_follow_from_metrics_csv(folder):
    """Three items under two seeds have 27 x 4 resamplings; of so few the interval takes them all."""
    right, pixels = table(folder, "Right or wrong"), table(folder, "Pixels")
    for name, rows in ("correct", right), ("edited", right), ("kept", right), ("l1_first", pixels):
        for method in SETTINGS:
            of = {}
            for e in edits(folder):
                if e["method"] == method and e[name]:
                    of.setdefault(e["item"], {}).setdefault(e["seed"], []).append(float(e[name]))
            assert {len(seeds) for seeds in of.values()} == {2}
            draws = [
                np.mean([np.mean([value for seed in seeds for value in item[seed]]) for item in items])
                for items in itertools.product(of.values(), repeat=3)
                for seeds in itertools.product("01", repeat=2)
            ]
            heading = {"l1_first": "L1 to first, grey levels ↓"}.get(name, f"{name} ↑")
            cell = rows[method][heading]
            mean = np.mean([np.mean([value for values in item.values() for value in values]) for item in of.values()])
            assert cell.mean == pytest.approx(mean, abs=1e-4)
            if rows is pixels:
                assert (cell.low, cell.high) == pytest.approx((min(draws), max(draws)), abs=1e-4)
            else:  # two right and two wrong are drawn from, too
                assert 0 <= cell.low < min(draws) + 0.15 and max(draws) - 0.15 < cell.high <= 1


def test_wins_ties_and_losses(folder):
    [pairs] = reporting.against_the_first(measured(folder)).parts
    of = {(row[0], row[1].rstrip(" ↑↓")): row for row in pairs.rows}
    *_, difference, items, verdict = of[IP2P, "correct"]  # by item 1/4, 0 and -1/2, and a pseudo-item of either side
    assert (difference.mean, difference.low, difference.high) == pytest.approx((-1 / 12, -1, 1), abs=1e-4)
    assert (items, verdict) == (3, "ties")
    *_, difference, _, verdict = of[IP2P, "L1 to first, grey levels"]
    assert verdict == "wins" and difference.high == pytest.approx(-3.0, abs=1e-4)
    assert of[GATE, "correct"][-1] == "ties"  # three items are too few to tell shares apart, even 0 and 5 / 6
    assert pairs.columns[-1] == "emilie:"


def test_only_what_is_significantly_best_is_bold(folder):
    lines = (folder / "report" / "report.md").read_text().splitlines()
    pixels, right = (
        next(i for i, line in enumerate(lines) if line == f"**{t}**") for t in ("Pixels", "Right or wrong")
    )
    assert lines[pixels + 4].startswith("| emilie | **85.9 [") and "**" not in lines[pixels + 5]
    assert not any("**" in line for line in lines[right + 2 : right + 7])


def test_timing(folder):
    seconds = [turn + 0.5 * i for i in range(3) for turn in (1, 2)] * 2
    times = table(folder, "Seconds")
    assert times[EMILIE]["seconds per edit, median [quartiles]"].mean == np.median(seconds)
    assert times[IP2P]["edits"] == 11


# ---- the page


class Page(HTMLParser):
    """What a page refers to, and the elements that it has."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        ]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file(folder):
    text = (folder / "report" / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"https?:|@import", text) and not {"script", "link", "iframe", "object"} & set(page.tags)
    kinds = {re.match("#|data:image/[a-z+]+;base64,", link)[0] for link in page.links}
    assert kinds == {"#", "data:image/png;base64,", "data:image/svg+xml;base64,"}
    assert not re.search(r"url\((?!#)", text)


def test_what_files_say_is_escaped(folder):
    text, markdown = ((folder / "report" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert NASTY in Page(text).text and "&lt;script&gt;alert(" in text
    assert "<" not in markdown.replace("<br>", "")
    weird = Table("a|b", ("x",), [("<b>|`\x1b[2J",), (Value(0.5, 0.25, 1.0),)])
    assert weird.markdown() == "**a\\|b**\n\n| x |\n| ---: |\n| &lt;b&gt;\\|\\`?\\[2J |\n| 0.50 [0.25, 1.00] |\n"


def test_a_run_that_is_not_finished_says_so_first(folder, copy, monkeypatch):
    for kind in ("html", "md"):
        text = (folder / "report" / f"report.{kind}").read_text()
        assert 0 < text.index("not finished: 1 of 36 edits") < text.index("What was run")
    at = copy / "edits" / slug(GATE) / "1" / "0003"
    shutil.copy(at / "1.png", at / "2.png")
    shutil.copy(at / "1.json", at / "2.json")
    monkeypatch.setattr("emilie_min.bench.report.curves", no_curves)
    report(read_run(copy), grids=0)
    assert "not finished" not in (copy / "report" / "report.html").read_text()


def test_failed_and_missing_edits_are_named(folder):
    page = Page((folder / "report" / "report.html").read_text())
    assert "the sampled latent is not finite" in page.text and "LPIPS" not in page.text
    counts = table(folder, "The methods and their edits")
    assert {m: (r["done"], r["failed"], r["missing"]) for m, r in counts.items()} == {
        EMILIE: (12, 0, 0),
        IP2P: (11, 1, 0),
        GATE: (11, 0, 1),
    }
    assert {m: (r["gate"], r["pixels"]) for m, r in counts.items()} == {
        EMILIE: ("anchor", ""),
        IP2P: ("", "truncate"),
        GATE: ("eq8", ""),
    }
    facts = table(folder, "The run")
    assert facts["seeds"]["which"] == "[0, 1]" and "torch" in facts["versions"]["which"] and "lpips" not in facts


# ---- what was measured is kept


def test_a_second_report_measures_nothing_and_is_the_same(folder, tmp_path, monkeypatch):
    calls = counting(monkeypatch)
    report(read_run(folder), tmp_path / "again")
    assert not calls
    first, second = ({p.name: p.read_bytes() for p in at.iterdir()} for at in (folder / "report", tmp_path / "again"))
    assert first == second


def test_only_what_is_new_or_damaged_is_measured(copy, monkeypatch):
    calls = counting(monkeypatch)
    monkeypatch.setattr("emilie_min.bench.report.curves", no_curves)
    at = copy / "edits" / slug(GATE) / "1" / "0003"

    def count():
        calls.clear()
        measured(copy)
        return len(calls)

    assert count() == 0
    Image.new("RGB", (64, 64), "red").save(at / "2.png")
    (at / "2.json").write_text((at / "1.json").read_text())
    assert (count(), count()) == (1, 0)
    Image.new("RGB", (64, 64), "blue").save(at / "1.png")
    assert (count(), count()) == (2, 0)  # the turn, and the one that follows it
    report(read_run(copy), grids=0)
    before = (copy / "report" / "metrics.csv").read_bytes()
    good = json.loads((at / "1.metrics.json").read_text())
    for bad in ("", "{", "5", "[" * 10**5, json.dumps({key: {"kept": "yes"} for key in good}), json.dumps({"key": 1})):
        (at / "1.metrics.json").write_text(bad)
        assert (count(), count()) == (1, 0)
    report(read_run(copy), grids=0)
    assert (copy / "report" / "metrics.csv").read_bytes() == before


def test_a_damaged_run_is_one_line(copy, monkeypatch, capsys):
    monkeypatch.setattr("emilie_min.bench.report.curves", no_curves)

    def refused(path, change):
        good = path.read_text()
        path.write_text(json.dumps(json.loads(good) | change))
        assert cli.main(["bench", "report", str(copy), "--out", str(copy / "again")]) == 2
        path.write_text(good)
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("emilie: error: ") and error.isprintable()
        return error

    assert "seeds is empty" in refused(copy / "run.json", {"seeds": []})
    at = copy / "edits" / slug(IP2P) / "0" / "0002"
    assert "seconds must be a whole number or a number, not '1.5'" in refused(at / "1.json", {"seconds": "1.5"})
    Image.new("RGB", (32, 48)).save(at / "1.png")
    assert "0002: its pictures have different sizes: remove this folder" in refused(at / "1.json", {})
    (at / "1.png").write_bytes(b"\x89PNG")
    assert "1.png cannot be read as a picture" in refused(at / "1.json", {})


def test_scorers_are_loaded_once_and_only_if_need_be(copy, monkeypatch):
    loaded = []

    class Clip:
        def __init__(self, model, device):
            loaded.append((model, device))

        def clip_score(self, image, instruction):
            return 0.25

        def image_similarity(self, before, after):
            return 0.5

        def direction_similarity(self, before, after, caption_before, caption_after):
            assert caption_before != caption_after and "circle" in caption_before
            return 0.75

    monkeypatch.setattr(metrics, "ClipScorer", Clip)
    monkeypatch.setattr("emilie_min.bench.report.curves", no_curves)
    for clip in ("a/model", None, "a/model"):
        report(read_run(copy), clip=clip, grids=0)
        assert loaded == [("a/model", "cpu")]
    rows = [e for e in edits(copy) if e["method"] == EMILIE]
    assert {(e["clip"], e["direction"], e["clip_image"]) for e in rows} == {("0.25", "0.75", "0.5")}
    with pytest.raises(BenchError, match="give a CLIP model too"):
        report(read_run(copy), blip="a/model")
    monkeypatch.setattr("emilie_min.bench.report.measure", lambda run, scorers, device: pytest.fail(str(scorers)))
    with pytest.raises(pytest.fail.Exception, match="'blip': 'b/model'"):
        report(read_run(copy), clip="a/model", blip="b/model")


def test_what_a_report_lacks_is_named(monkeypatch):
    from emilie_min.bench import page
    from emilie_min.bench.report import curves

    for package, needs in (("matplotlib", lambda: curves(None, "", [], "")), ("jinja2", page._environment.__wrapped__)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(BenchError, match=rf"need {package}: pip install"):
            needs()


def test_evenly_spaced():
    assert evenly_spaced(list(range(10)), 3) == [0, 3, 6] and evenly_spaced([1, 2], 5) == [1, 2]
    assert evenly_spaced([1, 2, 3], 1) == [1]


# ---- the study


def stripped(text):
    return re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", text)


def content(page):
    return json.loads(re.search(r'id="content">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


@pytest.fixture
def keyed(folder, tmp_path):
    """A study of all three methods: (page, key)."""
    page, key, said = study(read_run(folder), tmp_path / "study")
    assert said == "3 items, 3 methods"
    return page, key


def test_the_page_does_not_tell_the_methods(keyed):
    page, key = keyed
    text = stripped(page.read_text()).lower()
    for word in ("emilie", "ip2p", "gate", "eq8", "truncate", "anchor"):
        assert word not in text
    assert not re.search(r"https?:|@import", text) and '"0001"' not in text
    secret = json.loads(key.read_text())
    assert secret["methods"] == list(SETTINGS) and key.name not in text


def test_the_key_tells_which_picture_is_whose(keyed):
    page, key = keyed
    secret, chains = json.loads(key.read_text()), content(page)["chains"]
    assert content(page)["page"] == secret["page"] and len(chains) == 3
    worlds = list(scenes())
    for chain in chains:
        about = secret["chains"][chain["key"]]
        item = int(about["item"]) - 1
        assert decoded(chain["input"]).tobytes() == world.render(worlds[item][0]).tobytes()
        assert sorted(about["results"].values()) == sorted(SETTINGS)
        for result in chain["results"]:
            for turn, uri in enumerate(result["pictures"], 1):
                want = picture(about["results"][result["key"]], item, turn, worlds[item])
                assert decoded(uri).tobytes() == want.tobytes() and not decoded(uri).info
        assert [bool(turn["where"]) for turn in chain["turns"]] == [item != 2] * 2
    texts = [turn["text"] for chain in chains for turn in chain["turns"]]
    assert sorted(texts) == sorted(["make the circle blue"] * 3 + ["make the square green"] * 2 + [NASTY])


def test_the_order_in_the_page_tells_nothing(folder, tmp_path):
    """Results stand in the order of keys that are drawn anew for every page."""
    orders = set()
    for i in range(8):
        page, key, _ = study(read_run(folder), tmp_path / str(i), chains=1)
        names = json.loads(key.read_text())["chains"]
        for chain in content(page)["chains"]:
            assert chain["results"] == sorted(chain["results"], key=lambda result: result["key"])
            orders.add(tuple(names[chain["key"]]["results"][result["key"]] for result in chain["results"]))
    assert len(orders) > 1


def test_items_without_all_pictures_are_left_out(copy, tmp_path):
    info = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(info | {"seeds": [1]}))
    page, key, said = study(read_run(copy), tmp_path / "study")
    assert said == "1 items, 3 methods; 2 items lack a picture"
    assert [about["item"] for about in json.loads(key.read_text())["chains"].values()] == ["0002"]


def test_studies_that_cannot_be(folder, keyed, tmp_path):
    run = read_run(folder)
    for options, says in (
        ({"methods": [EMILIE, "nothing"]}, "has no method 'nothing'"),
        ({"methods": [EMILIE, EMILIE]}, "two methods or more"),
        ({"chains": 0}, "one chain or more"),
    ):
        with pytest.raises(BenchError, match=says):
            study(run, tmp_path / "other", **options)
    with pytest.raises(BenchError, match="has no item that all of"):
        study(replace(run, info=run.info | {"seeds": [99]}), tmp_path / "other")
    before = keyed[1].read_bytes()
    with pytest.raises(BenchError, match="is there already"):
        study(run, keyed[0].parent)
    assert keyed[1].read_bytes() == before


# ---- the tally


def answers(key, path, rater, picks, **more):
    """A file as the page downloads it; picks: {item: methods}."""
    secret = json.loads(key.read_text())
    choices = []
    for chain, about in secret["chains"].items():
        if about["item"] in picks:
            names = {method: name for name, method in about["results"].items()}
            choices.append(
                {"chain": chain, "chosen": [names[m] for m in picks[about["item"]]], "shown": list(names.values())}
            )
    path.write_text(json.dumps({"page": secret["page"], "rater": rater, "choices": choices} | more))
    return path


def split(result):
    return {row[0]: row[1].mean for row in result.rows}


def test_votes_are_split(keyed, tmp_path):
    _, key = keyed
    ann = answers(key, tmp_path / "a", "Ann", {"0001": [EMILIE], "0002": [EMILIE, IP2P], "0003": []})
    bob = answers(key, tmp_path / "b", "Bob", {"0001": [EMILIE], "0002": list(SETTINGS)})
    result = tally(key, [ann, bob])
    assert split(result) == pytest.approx({EMILIE: 50, IP2P: 10, GATE: 0, NO_DIFFERENCE: 40})
    assert {row[0]: row[2:] for row in result.rows} == {
        EMILIE: (2, 1),
        IP2P: (0, 1),
        GATE: (0, 0),
        NO_DIFFERENCE: (2, 0),
    }
    assert "5 votes of 2 raters on 3 of 3 chains" in result.note
    # EMILIE's votes by chain: 2 of 2, 0.5 of 2, 0 of 1; the 27 resamplings of chains
    sums, counts = (np.array(list(itertools.product(v, repeat=3))).sum(1) for v in ((2, 0.5, 0), (2, 2, 1)))
    low, high = limits(100 * sums / counts)
    assert (result.rows[0][1].low, result.rows[0][1].high) == pytest.approx((low, high), abs=1)


def test_an_interval_where_all_agree(keyed, tmp_path):
    _, key = keyed
    path = answers(key, tmp_path / "a", "Ann", {item: [EMILIE] for item in ("0001", "0002", "0003")})
    rows = {row[0]: row[1] for row in tally(key, [path]).rows}
    assert rows[EMILIE].mean == 100 and rows[EMILIE].high == 100
    assert rows[EMILIE].low == pytest.approx(100 / (1 + 1.96**2 / 3)) and rows[GATE].high == pytest.approx(
        100 - rows[EMILIE].low
    )


def test_answers_that_are_refused(keyed, folder, tmp_path):
    _, key = keyed
    good = answers(key, tmp_path / "good", "Ann", {"0001": [EMILIE]})
    given = json.loads(good.read_text())
    [choice] = given["choices"]
    other = next(chain for chain in json.loads(key.read_text())["chains"] if chain != choice["chain"])

    def refused(says, paths=None, **more):
        path = tmp_path / "bad"
        path.write_text(json.dumps(given | more))
        with pytest.raises(BenchError, match=says) as error:
            tally(key, paths or [path])
        assert "\n" not in str(error.value)

    refused("answers another page", page="0" * 64)
    refused("both of rater 'Ann'", [good, good])
    refused("answers twice", choices=[choice, choice])
    refused("answers twice", choices=[choice | {"chosen": choice["chosen"] * 2}])
    refused("a chain that the page does not have", choices=[choice | {"chain": "made up"}])
    refused("chooses a result that chain", choices=[choice | {"chain": other}])
    refused("lacks 'chosen'", choices=[{"chain": choice["chain"]}])
    refused("a result that chain", choices=[choice | {"chosen": [["x"]]}])
    refused("choices must be a list", choices=None)
    refused("rater must be a text", rater=3)
    refused("choices is empty", choices=[])
    (tmp_path / "junk").write_bytes(b"\xff\x00")
    refused("cannot be read", [tmp_path / "junk"])
    refused("cannot be read", [tmp_path / "none"])
    with pytest.raises(BenchError, match="is not the key"):
        tally(good, [good])
    with pytest.raises(BenchError, match="no answers"):
        tally(key, [])


@pytest.mark.parametrize("methods", [5, "emilie", [], [1], None, {}, [EMILIE, IP2P]])
def test_a_damaged_key_is_one_line(methods, keyed, tmp_path, capsys):
    _, key = keyed
    given = answers(key, tmp_path / "a", "Ann", {"0001": [EMILIE]})
    key.write_text(json.dumps(json.loads(key.read_text()) | {"methods": methods}))
    assert cli.main(["bench", "tally", str(key), str(given)]) == 2
    assert re.search(r"methods\b.*(must be|is empty)|none of its methods", capsys.readouterr().err)


def test_a_key_cannot_write_to_the_terminal(keyed, tmp_path, capsys):
    _, key = keyed
    given = answers(key, tmp_path / "a", "Ann", {"0001": [EMILIE]})
    key.write_text(key.read_text().replace(f'"{EMILIE}"', r'"\u001b[2J\ud800"'))
    assert cli.main(["bench", "tally", str(key), str(given)]) == 0
    assert "\x1b" not in capsys.readouterr().out


# ---- in a browser

BROWSER, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
OPTIONS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
OPTIONS += " disable-component-update disable-sync"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window; what it downloads goes into `browser.downloads`."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium to try the pages in a browser")
    if not Path(BROWSER).exists() or not Path(DRIVER).exists():
        pytest.skip("apt-get install chromium chromium-driver to try the pages in a browser")
    from selenium.webdriver.chrome.service import Service

    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS.split(), f"user-data-dir={folder / 'profile'}", "window-size=1200,1000"):
        options.add_argument(f"--{option}")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.downloads = folder / "downloads"
    yield driver
    driver.quit()


def opened(browser, path):
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert not browser.execute_script(
        "return performance.getEntriesByType('resource').filter(e => !/^data:/.test(e.name))"
    )


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def click(browser, selector):
    [element] = find(browser, selector)
    element.click()


def downloaded(browser, button):
    """The file that a button downloads."""
    before = set(browser.downloads.glob("*"))
    click(browser, button)
    until = time.time() + 20
    while time.time() < until:
        new = [path for path in set(browser.downloads.glob("*")) - before if path.suffix == ".json"]
        if new:
            return new[0]
        time.sleep(0.05)
    raise AssertionError("nothing was downloaded")


def begin(browser, page, rater):
    opened(browser, page)
    find(browser, "#rater")[0].send_keys(rater)
    click(browser, "#begin")


def choose(browser, key, item_to_method):
    """Click on the result that a method made of the item that is shown; the item."""
    secret = json.loads(key.read_text())["chains"]
    shown = {card.get_attribute("data-key"): card for card in find(browser, ".result")}
    [about] = [about for about in secret.values() if about["results"].keys() == shown.keys()]
    for name, method in about["results"].items():
        if method == item_to_method.get(about["item"]):
            shown[name].click()
    return about["item"]


def test_the_report_in_a_browser(folder, browser):
    opened(browser, folder / "report" / "report.html")
    assert browser.get_log("browser") == []
    assert "3 ways to edit" in browser.title and len(find(browser, "section")) == 6
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0 and len(find(browser, "img")) > 20
    figures = find(browser, "figure img")
    assert len(figures) == 2 and all(figure.size["width"] > 300 for figure in figures)
    drift = (folder / "report" / "drift.svg").read_text()
    assert "PSNR to first, dB" in drift and "emilie:gate=eq8" in drift
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(wide) <= 0


def test_a_study_in_a_browser(keyed, browser):
    page, key = keyed
    begin(browser, page, "Ann O'Neill")
    wanted = {"0001": EMILIE, "0002": IP2P, "0003": GATE}
    seen = []
    for _ in range(3):
        assert find(browser, "#progress")[0].text == f"{len(seen) + 1} of 3"
        assert not find(browser, "#next")[0].is_enabled()
        seen.append(choose(browser, key, wanted))
        click(browser, "#next")
    assert sorted(seen) == sorted(wanted) and "3 of 3 answered" in find(browser, "#done")[0].text
    click(browser, "#back")
    [chosen] = [card for card in find(browser, ".result") if card.get_attribute("aria-pressed") == "true"]
    chosen.click()  # takes it back
    assert not find(browser, "#next")[0].is_enabled()
    changed = {"0001": IP2P, "0002": EMILIE, "0003": IP2P}[seen[2]]
    choose(browser, key, {seen[2]: changed})
    click(browser, "#next")
    file = downloaded(browser, "#download")
    assert file.name.startswith("answers_Ann_O_Neill_") and json.loads(file.read_text())["rater"] == "Ann O'Neill"
    final = wanted | {seen[2]: changed}
    expected = {m: 100 * list(final.values()).count(m) / 3 for m in SETTINGS}
    assert split(tally(key, [file])) == pytest.approx(expected | {NO_DIFFERENCE: 0})
    assert browser.get_log("browser") == []


def test_ties_every_turn_and_keys_in_a_browser(keyed, browser):
    from selenium.webdriver.common.keys import Keys

    page, key = keyed
    begin(browser, page, "Bob")

    def press(*keys):
        for k in keys:
            browser.switch_to.active_element.send_keys(k)

    assert len(find(browser, ".result img")) == 3
    click(browser, "#unfold")
    assert len(find(browser, ".result img")) == 6
    click(browser, "#unfold")
    press("a", "c", Keys.ARROW_RIGHT, "0", Keys.ARROW_RIGHT, "b", Keys.ARROW_LEFT)
    assert find(browser, "#progress")[0].text == "2 of 3"
    assert find(browser, "#none")[0].get_attribute("aria-pressed") == "true"
    given = json.loads(downloaded(browser, "#so-far").read_text())
    assert [len(choice["chosen"]) for choice in given["choices"]] == [2, 0, 1]
    first, _, third = given["choices"]
    assert first["chosen"] == [first["shown"][0], first["shown"][2]] and third["chosen"] == [third["shown"][1]]


def test_a_rater_goes_on_after_a_reload_and_another_sees_another_order(folder, browser, tmp_path, monkeypatch):
    names = iter(hashlib.sha256(str(i).encode()).hexdigest()[:12] for i in range(100))
    monkeypatch.setattr("emilie_min.bench.study.secrets.token_hex", lambda n: next(names))
    page, key, _ = study(read_run(folder), tmp_path / "study", seed=7)

    def shown():
        return [card.get_attribute("data-key") for card in find(browser, ".result")]

    begin(browser, page, "Ann")
    click(browser, "#none")
    click(browser, "#next")
    second = shown()
    begin(browser, page, "Ann")
    assert find(browser, "#progress")[0].text == "2 of 3" and shown() == second
    orders = set()
    for rater in ("Bob", "Cleo", "Dan", "Eve"):
        begin(browser, page, rater)
        assert find(browser, "#progress")[0].text == "1 of 3" and not find(browser, "#next")[0].is_enabled()
        orders.add(tuple(shown()))
    assert len(orders) > 1
