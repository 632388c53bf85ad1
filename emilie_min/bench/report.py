"""A run's report: one page with tables, curves and pictures, and the same tables as Markdown and CSV.

    FOLDER/report.html     all of it, in one file that needs no other
          /report.md       the tables
          /*.csv           each table; metrics.csv has a line for each edit
          /*.svg           the figures
    RUN/metrics.jsonl      what was measured, so that the next report measures only what is new

How things are counted: an edit that failed, or that came after a failure in its chain, is wrong wherever right and
wrong are known, and is left out of measures of pictures. An edit that has not been run yet is left out of everything.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import BenchError
from ..toy import judge
from . import metrics
from .data import Item
from .metrics import METRICS, Interval, Metric
from .page import SMALL, Table, Value, data_uri, evenly, open_picture, plain, render, save, to_csv, working_mask
from .run import Outcome, Run

CHAIN = Metric("whole chain correct", "share", "higher", "every picture of the chain is right, from first to last")
KNOWN = {"chain": CHAIN} | METRICS  # "chain" of turn k: all pictures up to k are right
GROUPS = {  # table: (title, metrics)
    "correctness": ("Right or wrong", ("chain", "correct", "edited", "kept", "retained", "lost")),
    "pictures": ("Pixels", tuple(name for name in METRICS if name.endswith(("_target", "_outside", "_first")))),
    "scores": ("CLIP and BLIP", ("clip", "blip", "direction", "clip_image")),
}
DRIFT = ("psnr_first", "l1_first", "psnr_target", "psnr_outside")  # panels of Fig. 2
TURNS = ("correct", "chain", "edited", "kept", "retained")  # tables by turn
ABLATED = ("chain", "correct", "edited", "kept", "psnr_outside", "psnr_first", "clip", "direction")  # columns of Fig. 8
WIDE = 320  # px: larger pictures are scaled down to it in grids
INK = "#010203"  # in figures, what takes the page's own colour


@dataclass(frozen=True)
class Edit:
    """One turn of one chain, and what was measured of it."""

    method: str
    seed: int
    item: Item
    turn: int  # from 1
    state: str  # "done", "failed": an error ended the chain here or before, "missing": not run yet
    outcome: Outcome | None
    values: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    name: str
    svg: str  # a file's content
    caption: str

    @cached_property
    def inline(self):
        """The figure as an element of a page: its ink is the page's."""
        from markupsafe import Markup

        svg = self.svg[self.svg.index("<svg") :].replace(INK, "currentColor")
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
        return Markup(re.sub(r'<g id="\w+_\d+">', "<g>", svg))


@dataclass(frozen=True)
class Picture:
    uri: str
    about: str
    right: bool | None = None  # None: not known
    small: bool = True


@dataclass(frozen=True)
class Grid:
    """Pictures of one chain: a row for each method, the input first."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Picture | str]]]  # a text stands where there is no picture


@dataclass(frozen=True)
class Section:
    title: str
    paragraphs: list[str]
    parts: list[Table | Figure | Grid]


def report(
    run: Run,
    out: str | Path | None = None,
    clip: str | None = None,
    blip: str | None = None,
    lpips: bool = False,
    grids: int = 6,
    device: str = "cpu",
) -> Path:
    """Measure a run and write its report into a folder, RUN/report by default; the page's path.

    clip, blip: model names or folders of `metrics.ClipScorer` and `BlipScorer`; grids: how many chains to show as
    pictures. Everything is compared with the first method of the run. Raises BenchError.
    """
    if blip and not clip:
        raise BenchError("BLIP scores compare texts by CLIP: give a CLIP model too (--clip)")
    out = run.path / "report" if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(run, measure(run, clip, blip, lpips, device))
    sections = [
        what_was_run(results, clip, blip, lpips),
        how_good(results),
        against_the_first(results),
        by_turn(results),
        pictures(results, grids),
        drift(results),
        ablations(results),
        costs(results),
    ]
    sections = [section for section in sections if section]
    for part in (part for section in sections for part in section.parts):
        if isinstance(part, Table):
            save(out / f"{part.name}.csv", part.csv())
        elif isinstance(part, Figure):
            save(out / f"{part.name}.svg", part.svg.replace(INK, "#000000"))
    save(out / "metrics.csv", every_edit(results))
    title = f"{len(results.methods)} ways to edit, measured on {Path(run.info['bench']).name}"
    save(out / "report.md", markdown(title, results.unfinished, sections))
    page = out / "report.html"
    save(page, render("report.html", title=title, unfinished=results.unfinished, sections=sections))
    return page


# ---- measuring


def measure(run: Run, clip: str | None, blip: str | None, lpips: bool, device: str) -> list[Edit]:
    """Every edit of a run with what can be said of it, in the order methods, seeds, items, turns."""
    from tqdm import tqdm

    edits = []
    for method in run.info["methods"]:
        for seed in run.info["seeds"]:
            for item in run.items:
                failed = False
                for turn in range(1, len(item.turns) + 1):
                    outcome = run.outcome(method, seed, item.id, turn)
                    failed |= bool(outcome and outcome.error)
                    state = "failed" if failed else "missing" if outcome is None else "done"
                    edits.append(Edit(method, seed, item, turn, state, outcome))
    scorers = _Scorers(clip, blip, lpips, device)
    store = run.path / "metrics.jsonl"
    known, cut = _stored(store)
    keys = [None if edit.state == "missing" else _key(run, edit, scorers) for edit in edits]
    new = {key: edit for edit, key in zip(edits, keys) if key and key not in known}  # the same pictures count once
    if new:
        with open(store, "a", encoding="utf-8") as f:
            f.write("\n" * cut)
            for key, edit in tqdm(new.items(), desc="measuring", unit="edit"):
                known[key] = _measure(run, edit, scorers)
                line = {"method": edit.method, "seed": edit.seed, "item": edit.item.id, "turn": edit.turn}
                f.write(json.dumps({"key": key, **line, "values": known[key]}) + "\n")
                f.flush()
    right = True
    for edit, key in zip(edits, keys):
        edit.values.update(known[key] if key else {})
        right = edit.values.get("correct") if edit.turn == 1 else right and edit.values.get("correct")
        if edit.item.turns[edit.turn - 1].truth and edit.state != "missing":
            edit.values["chain"] = right
    return edits


def _stored(path: Path) -> tuple[dict[str, dict], bool]:
    """What was measured before, and whether its last line was cut off when a report was killed: that is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    known = {}
    for line in text.splitlines():
        try:
            record = json.loads(line)
            known[record["key"]] = record["values"]
        except (ValueError, KeyError, TypeError):
            continue
    return known, bool(text) and not text.endswith("\n")


class _Scorers:
    """The models that were asked for, loaded when the first edit needs them."""

    def __init__(self, clip: str | None, blip: str | None, lpips: bool, device: str):
        self.names, self.device = {"clip": clip, "blip": blip, "lpips": lpips}, device

    @cached_property
    def loaded(self) -> dict:
        clip = metrics.ClipScorer(self.names["clip"], self.device) if self.names["clip"] else None
        blip = metrics.BlipScorer(clip, self.names["blip"], self.device) if self.names["blip"] else None
        return {"clip": clip, "blip": blip, "lpips": metrics.LpipsScorer(self.device) if self.names["lpips"] else None}


@cache
def _sha256(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash(path: Path | None) -> str | None:
    return None if path is None or not path.exists() else _sha256(path, path.stat().st_mtime_ns)


def _paths(run: Run, edit: Edit) -> tuple[Path | None, Path | None, Path]:
    """The pictures before, after and first, as far as there are any."""
    folder = run.folder(edit.method, edit.seed, edit.item.id)
    before = folder / f"{edit.turn - 1}.png"
    return before if before.exists() else None, edit.outcome.image if edit.outcome else None, folder / "0.png"


def _key(run: Run, edit: Edit, scorers: _Scorers) -> str:
    """A hash of all that an edit's measures depend on: the pictures, what was asked, the scorers, and our code."""
    turns = edit.item.turns[: edit.turn]
    parts = [
        [_hash(Path(module.__file__)) for module in (metrics, judge)],
        scorers.names,
        [_hash(path) for path in _paths(run, edit)],
        [edit.item.caption, edit.item.truth and edit.item.truth.to_dict(), _hash(edit.item.image)],
        [[t.instruction, t.caption, t.truth and t.truth.to_dict(), _hash(t.region or t.mask)] for t in turns],
        _hash(turns[-1].target),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _measure(run: Run, edit: Edit, scorers: _Scorers) -> dict:
    before, after, first = (path and open_picture(path) for path in _paths(run, edit))
    item, turns = edit.item, edit.item.turns[: edit.turn]
    truths = [item.truth, *(turn.truth for turn in turns)]
    captions = [item.caption, *(turn.caption for turn in turns)][-2:]
    return metrics.measure_turn(
        before,
        after,
        first,
        turns[-1].instruction,
        captions=tuple(captions),
        regions=[working_mask(item, turn.region or turn.mask, first.size) for turn in turns],
        target=_target(turns[-1].target, first.size),
        truths=truths if all(truths) else None,
        **scorers.loaded,
    )


def _target(path: Path | None, size: tuple[int, int]) -> Image.Image | None:
    if path is None:
        return None
    target = open_picture(path)
    if target.size != size:
        from ..canvas import images

        target = images.fit(images.read_image(path), size)
    return target


# ---- counting


class Results:
    """The edits of a run, by method and metric."""

    def __init__(self, run: Run, edits: list[Edit]):
        self.run, self.edits = run, edits
        self.methods: list[str] = list(run.info["methods"])
        self.seeds: list[int] = run.info["seeds"]
        self.turns = max(len(item.turns) for item in run.items)
        self.at = {(edit.method, edit.seed, edit.item.id, edit.turn): edit for edit in edits}
        has = {name for edit in edits for name, value in edit.values.items() if value is not None}
        self.metrics = [name for name in KNOWN if name in has]
        self.count = {state: sum(edit.state == state for edit in edits) for state in ("done", "failed", "missing")}
        self._series: dict = {}
        self._intervals: dict = {}

    @property
    def unfinished(self) -> str:
        """A line for a run that is not finished, else nothing."""
        if not self.count["missing"]:
            return ""
        return (
            f"This run is not finished: {self.count['missing']} of {len(self.edits)} edits still to be made. What "
            "follows is about the others. The same command, emilie bench run, goes on with it."
        )

    def values(self, method: str, metric: str, turn: int | None = None) -> dict[str, list[float | None]]:
        """{item: one value per seed and turn}; of one turn if given; of "chain" the last turn's."""
        key = method, metric, turn
        if key not in self._series:
            self._series[key] = {
                item.id: [
                    self.at[method, seed, item.id, t].values.get(metric)
                    for seed in self.seeds
                    for t in self._which(item, metric, turn)
                ]
                for item in self.run.items
            }
        return self._series[key]

    def _which(self, item: Item, metric: str, turn: int | None) -> list[int]:
        last = len(item.turns)
        if turn is not None:
            return [turn] if turn <= last else []
        return [last] if metric == "chain" else list(range(1, last + 1))

    def interval(self, method: str, metric: str, turn: int | None = None) -> Interval:
        key = method, metric, turn
        if key not in self._intervals:
            self._intervals[key] = metrics.bootstrap(self.values(*key))
        return self._intervals[key]

    def difference(self, a: str, b: str, metric: str) -> Interval:
        key = a, b, metric
        if key not in self._intervals:
            self._intervals[key] = metrics.paired_bootstrap(self.values(a, metric), self.values(b, metric))
        return self._intervals[key]

    def best(self, metric: str) -> str | None:
        """The method that beats every other in a metric, each by a paired interval without 0."""
        better = KNOWN[metric].better
        sign = 1 if better == "higher" else -1
        means = {m: sign * self.interval(m, metric).mean for m in self.methods if self.interval(m, metric).items}
        if len(means) < 2:
            return None
        top = max(means, key=means.get)
        return (
            top if all(self.difference(top, m, metric).verdict(better) == "wins" for m in means if m != top) else None
        )


def value(interval: Interval, metric: str, best: bool = False) -> Value | None:
    """A table's cell; None where no item has a value."""
    if not interval.items:
        return None
    ranged = not np.isnan(interval.low)
    low, high = (interval.low, interval.high) if ranged else (None, None)
    return Value(interval.mean, low, high, digits(metric), best)


def digits(metric: str) -> int:
    name, unit = metric.split("_")[0], KNOWN[metric].unit
    return 2 if unit == "share" or name == "l1" else 1 if unit == "dB" else 3


def heading(metric: str) -> str:
    known = KNOWN[metric]
    unit = f", {known.unit}" if known.unit not in ("", "share") else ""
    return f"{known.title}{unit} {'↑' if known.better == 'higher' else '↓'}"


def explained(names: list[str]) -> str:
    return " ".join(f"{KNOWN[name].title}: {KNOWN[name].what}." for name in names)


def listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


# ---- sections


def what_was_run(results: Results, clip: str | None, blip: str | None, lpips: bool) -> Section:
    run, info = results.run, results.run.info
    models = [
        (f"model for {role}", f"{model['name']}, sha256 {model['sha256'] or 'unknown'}")
        for role, model in info.get("models", {}).items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in info.get("versions", {}).items())
    edits = sum(len(item.turns) for item in run.items)
    facts = [
        ("run", str(run.path.resolve())),
        ("benchmark", f"{info['bench']}, sha256 of bench.jsonl {info['bench_sha256']}"),
        ("items", f"{len(run.items)}, with {edits} turns in all"),
        ("seeds", ", ".join(map(str, results.seeds))),
        *models,
        ("versions", versions),
        ("continued with", "; ".join(json.dumps(v) for v in info.get("continued_with", [])) or None),
        ("device", f"{info.get('device')}, {info.get('dtype')}"),
        ("steps", "each method's own" if info.get("steps") is None else str(info["steps"])),
        ("text-to-image methods are told", info.get("prompt") and f"the {info['prompt']}"),
        ("CLIP", clip),
        ("BLIP", blip),
        ("LPIPS", "AlexNet, version 0.1" if lpips else None),
    ]
    settings = list(dict.fromkeys(name for about in info["methods"].values() for name in about["settings"]))
    rows, failures = [], []
    for name, about in info["methods"].items():
        of = [edit for edit in results.edits if edit.method == name]
        counts = [sum(edit.state == state for edit in of) for state in ("done", "failed", "missing")]
        given = (_setting(about["settings"].get(key, "")) for key in settings)
        rows.append((name, about["class"], *counts, *given))
        for edit in of:
            if edit.outcome and edit.outcome.error:
                failures.append((name, edit.seed, edit.item.id, edit.turn, edit.outcome.error))
    parts = [
        Table("run", "The run", ("what", "which"), [(k, v) for k, v in facts if v]),
        Table(
            "methods",
            "The methods, their edits and their settings",
            ("method", "class", "done", "failed", "missing", *settings),
            rows,
            "Settings left empty are not the method's; none means the model's own.",
        ),
    ]
    if failures:
        columns = ("method", "seed", "item", "turn", "error")
        parts.append(Table("failures", "Edits that ended their chain", columns, failures))
    n = results.count
    counted = (
        f"{n['done']} edits were made; {n['failed']} failed or came after a failure in their chain. These count as "
        "wrong where right and wrong are known, and are left out of measures of pictures."
        if n["failed"]
        else f"{n['done']} edits were made and none failed."
    )
    absent = [name for name in METRICS if name not in results.metrics]
    reasons = {
        "no truth in the benchmark": ("correct", "edited", "kept", "retained", "lost"),
        "CLIP was not asked for": () if clip else ("clip", "direction", "clip_image"),
        "BLIP was not asked for": () if blip else ("blip",),
        "LPIPS was not asked for": () if lpips else ("lpips_outside",),
    }
    said = []
    for reason, names in reasons.items():
        if here := [name for name in names if name in absent]:
            said.append(f"{listed([KNOWN[name].title for name in here])} ({reason})")
            absent = [name for name in absent if name not in here]
    if absent:
        said.append(f"{listed([KNOWN[name].title for name in absent])} (no edit has it)")
    left_out = [f"Left out of the tables: {'; '.join(said)}."] if said else []
    return Section("What was run", [counted, *left_out], parts)


def _setting(setting: object) -> str:
    return setting if isinstance(setting, str) else "none" if setting is None else json.dumps(setting)


def how_good(results: Results) -> Section:
    """Table 1."""
    parts = []
    for name, (title, names) in GROUPS.items():
        if here := [metric for metric in names if metric in results.metrics]:
            best = {metric: results.best(metric) for metric in here}
            rows = [
                (m, *(value(results.interval(m, metric), metric, best[metric] == m) for metric in here))
                for m in results.methods
            ]
            parts.append(Table(name, title, ("method", *map(heading, here)), rows, explained(here)))
    text = (
        "Each number is the mean over items of an item's mean over seeds and turns, with its 95% interval from a "
        "bootstrap over items. Bold: better than every other method, each by a paired interval that leaves out 0. "
        f"Identical pictures count as {metrics.PSNR_CAP:.0f} dB."
    )
    return Section("Results", [text], parts)


def against_the_first(results: Results) -> Section | None:
    """Where the first method wins, ties or loses."""
    first, others = results.methods[0], results.methods[1:]
    if not others or not results.metrics:
        return None
    said, rows = [], []
    for other in others:
        verdicts: dict[str, list[str]] = {"wins": [], "ties": [], "loses": []}
        for metric in results.metrics:
            apart = results.difference(first, other, metric)
            if not apart.items:
                continue
            verdict = apart.verdict(KNOWN[metric].better)
            verdicts[verdict].append(KNOWN[metric].title)
            ours, theirs = (value(results.interval(m, metric), metric) for m in (first, other))
            plain_means = (v and Value(v.mean, digits=v.digits) for v in (ours, theirs))
            rows.append((other, heading(metric), *plain_means, value(apart, metric), apart.items, verdict))
        told = [f"{verdict} on {listed(names)}" for verdict, names in verdicts.items() if names]
        if told:
            said.append(f"Against {other}, {first} {'; '.join(told)}.")
    note = (
        "The difference is taken value by value, on the same item, seed and turn, where both have one; items: those "
        "with such a pair. Wins and loses: the interval leaves out 0. Each interval stands for itself: where two "
        "methods do not differ, about one comparison in twenty says win or loss all the same."
    )
    columns = ("against", "metric", first, "the other", "difference", "items", first + ":")
    table = Table("pairwise", "Paired differences", columns, rows, note)
    return Section(f"Where {first} wins, ties and loses", said, [table])


def by_turn(results: Results) -> Section | None:
    """Right and wrong over the turns of a chain."""
    here = [metric for metric in TURNS if metric in results.metrics]
    if not here or results.turns < 2:
        return None
    parts: list = [curves(results, "turns", [m for m in here if m in ("correct", "chain")], "Right pictures, by turn.")]
    titles = {"chain": "All pictures right up to a turn"}
    for metric in here:
        title = titles.get(metric, f"{KNOWN[metric].title[0].upper()}{KNOWN[metric].title[1:]}, by turn")
        parts.append(turn_table(results, f"by_turn_{metric}", title, metric))
    return Section("Right or wrong, turn by turn", [], parts)


def turn_table(results: Results, name: str, title: str, metric: str) -> Table:
    turns = range(1, results.turns + 1)
    rows = [(m, *(value(results.interval(m, metric, turn), metric) for turn in turns)) for m in results.methods]
    note = f"{explained([metric])}" if metric != "chain" else ""
    counts = [max(results.interval(m, metric, turn).items for m in results.methods) for turn in turns]
    if len(set(counts)) > 1:
        note += f" Items with a value, by turn: {', '.join(map(str, counts))}."
    return Table(name, title, ("method", *(f"turn {turn}" for turn in turns)), rows, note.strip())


def drift(results: Results) -> Section | None:
    """Fig. 2."""
    here = [metric for metric in DRIFT if metric in results.metrics]
    if not here or results.turns < 2:
        return None
    caption = f"After each turn: means over items; bands: 95% intervals. {explained(here)}"
    parts: list = [curves(results, "drift", here, caption)]
    parts += [turn_table(results, f"drift_{metric}", f"{KNOWN[metric].title}, by turn", metric) for metric in here]
    text = (
        "How far pictures drift over a chain. What lies in none of the regions so far should stay as it was in the "
        f"input; where they cover the whole picture nothing is left to compare. Identical pictures count as "
        f"{metrics.PSNR_CAP:.0f} dB."
    )
    return Section("Drift over a chain", [text], parts)


def ablations(results: Results) -> Section | None:
    """Fig. 8: methods that are one method under several settings, by what the settings differ in."""
    about = results.run.info["methods"]
    parts, families = [], {}
    for name in about:
        family = re.match(r"(.*\.py:)?[^:]*", name)[0]  # the name without its settings
        families.setdefault(family, []).append(name)
    for family, names in families.items():
        base = family if family in names else names[0]
        groups: dict[tuple, list] = {}
        for name in names:
            settings, others = about[name]["settings"], about[base]["settings"]
            changed = tuple(key for key in settings if settings[key] != others.get(key))
            if changed:
                groups.setdefault(changed, []).append(name)
        for changed, members in groups.items():
            members = [base, *members]
            here = [metric for metric in ABLATED if metric in results.metrics]
            rows = [
                (
                    name,
                    *(_setting(about[name]["settings"].get(key, "")) for key in changed),
                    *(value(results.interval(name, metric), metric) for metric in here),
                )
                for name in members
            ]
            file = re.sub(r"[^A-Za-z0-9.-]", "_", "_".join(("ablation", base, *changed)))
            title = f"{base}: what {listed(list(changed))} changes"
            parts.append(Table(file, title, ("method", *changed, *map(heading, here)), rows))
            parts.append(grid(results, evenly(results.run.items, 1)[0], members))
    return Section("Ablations", [], parts) if parts else None


def costs(results: Results) -> Section | None:
    rows = []
    for method in results.methods:
        seconds = [e.outcome.seconds for e in results.edits if e.method == method and e.state == "done"]
        middle = Value(float(np.median(seconds)), *np.percentile(seconds, (25, 75)).tolist()) if seconds else None
        rows.append((method, middle, len(seconds)))
    columns = ("method", "seconds per edit, median [quartiles]", "edits")
    note = "As the run measured them; on a machine that did other things as well they are too long."
    return Section("Costs", [], [Table("costs", "Time", columns, rows, note)])


def pictures(results: Results, number: int) -> Section | None:
    """Fig. 6."""
    chosen = evenly(results.run.items, number) if number > 0 else []
    if not chosen:
        return None
    text = (
        f"{len(chosen)} of {len(results.run.items)} chains, evenly spaced, with seed {results.seeds[0]}. The outline "
        "is the mask that the edit used, given or found."
    )
    if "correct" in results.metrics:
        text += " ✓ and ✗: whether the whole picture is what the instructions so far ask for."
    return Section("Pictures", [text], [grid(results, item, results.methods) for item in chosen])


def grid(results: Results, item: Item, methods: list[str]) -> Grid:
    """A chain under the run's first seed."""
    seed, rows = results.seeds[0], []
    for method in methods:
        start = results.run.folder(method, seed, item.id) / "0.png"
        cells: list = [_picture(start, "the input") if start.exists() else "not run"]
        for turn in range(1, len(item.turns) + 1):
            edit = results.at[method, seed, item.id, turn]
            if edit.state != "done":
                cells.append("failed" if edit.state == "failed" else "not run")
                continue
            right = edit.values.get("correct")
            cells.append(_picture(edit.outcome.image, f"{method}, turn {turn}", edit.outcome.mask, right))
        rows.append((method, cells))
    columns = ["input", *(f"{i}. {turn.instruction}" for i, turn in enumerate(item.turns, 1))]
    return Grid(f"Item {item.id}", columns, rows)


def _picture(path: Path, about: str, mask: Path | None = None, right: bool | None = None) -> Picture:
    image = open_picture(path)
    uri = data_uri(image, open_picture(mask).convert("L") if mask else None, WIDE)
    return Picture(uri, about, right, max(image.size) <= SMALL)


# ---- figures


def curves(results: Results, name: str, names: list[str], caption: str) -> Figure:
    """A panel for each metric: its mean over items by turn, one line a method, with bands for the intervals."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise BenchError("figures need matplotlib: pip install 'emilie_min[bench]'") from error
    import io

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    colours = [f"C{i}" for i in range(10)]
    turns = list(range(1, results.turns + 1))
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    with matplotlib.rc_context(style):
        legend_room = 0.3 + 0.22 * -(-len(results.methods) // 3)
        figure = Canvas(figsize=(4.2 * columns, 2.6 * rows + legend_room), layout="constrained")
        lines = []
        for i, metric in enumerate(names):
            axes = figure.add_subplot(rows, columns, i + 1)
            lines = []
            for j, method in enumerate(results.methods):
                intervals = [results.interval(method, metric, turn) for turn in turns]
                middle, low, high = ([getattr(v, part) for v in intervals] for part in ("mean", "low", "high"))
                look = {"color": colours[j % 10], "linestyle": ("-", "--", ":", "-.")[j // 10 % 4]}
                lines += axes.plot(turns, middle, marker="os^Dv"[j % 5], markersize=3.5, linewidth=1.4, **look)
                axes.fill_between(
                    turns, low, high, color=look["color"], alpha=0.8 / max(6, len(results.methods)), linewidth=0
                )
            axes.set_title(heading(metric), fontsize=9)
            axes.set_xlabel("turn")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(color=INK, alpha=0.12, linewidth=0.6)
            if KNOWN[metric].unit == "share":
                axes.set_ylim(-0.03, 1.03)
        figure.legend(lines, results.methods, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return Figure(name, out.getvalue(), caption)


# ---- files


def every_edit(results: Results) -> str:
    """metrics.csv: a line for each method, seed, item and turn."""
    header = ["method", "seed", "item", "turn", "instruction", "state", "seconds", "error", *results.metrics]
    rows = []
    for e in results.edits:
        error, seconds = (e.outcome.error, e.outcome.seconds) if e.outcome else (None, None)
        measured = [None if (v := e.values.get(name)) is None else float(v) for name in results.metrics]
        asked = e.item.turns[e.turn - 1].instruction
        rows.append([e.method, e.seed, e.item.id, e.turn, asked, e.state, seconds, error, *measured])
    return to_csv(header, rows)


def markdown(title: str, unfinished: str, sections: list[Section]) -> str:
    """The report without its pictures."""
    blocks = [f"# {plain(title)}", *([f"**{plain(unfinished)}**"] if unfinished else [])]
    for section in sections:
        parts = [part for part in section.parts if not isinstance(part, Grid)]
        if not parts:
            continue
        blocks += [f"## {plain(section.title)}", *map(plain, section.paragraphs)]
        for part in parts:
            if isinstance(part, Table):
                blocks.append(part.markdown().rstrip())
            else:
                blocks.append(f"![{plain(part.name)}]({part.name}.svg)\n\n{plain(part.caption)}")
    return "\n\n".join(blocks) + "\n"
