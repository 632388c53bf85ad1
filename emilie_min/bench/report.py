"""A run's report: one page with tables, curves and pictures, and all that was measured as a table.

    FOLDER/report.html     all of it, in one file that needs no other
          /report.md       the tables
          /metrics.csv     a line for each edit, from which every table follows
          /*.svg           the figures
    RUN/edits/METHOD/SEED/ITEM/1.metrics.json, ...   what was measured, so that the next report measures what is new

How things are counted: an edit that failed, or that came after a failure in its chain, is wrong wherever right and
wrong are known, and is left out of measures of pictures. An edit that has not been run yet is left out of everything.
"""

import base64
import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

from ..checkpoint.writing import write_bytes
from ..errors import BenchError
from ..toy import judge
from . import metrics
from .data import Item
from .io import open_picture, read_json
from .metrics import METRICS, Interval, Metric
from .page import SMALL, Table, Value, data_uri, escape_markdown, evenly_spaced, render, save, working_mask
from .run import Run, TurnResult
from .trust import trust

CHAIN = Metric("whole chain correct", "share", "higher", "every picture of the chain is right, from first to last")
KNOWN = {"chain": CHAIN} | METRICS  # "chain" of turn k: all pictures up to k are right
TABLES = {  # title: metrics
    "Right or wrong": ("chain", "correct", "edited", "kept", "retained", "lost"),
    "What is wrong": ("misplaced", "wrong_thing", "unclean"),
    "Pixels": tuple(name for name in METRICS if name.endswith(("_target", "_inside", "_outside", "_first"))),
    "CLIP and BLIP": ("clip", "clip2", "blip", "borne_out", "clip_caption", "direction", "clip_image"),
}
CURVES = {"turns": ("correct", "chain"), "drift": ("psnr_first", "l1_first", "psnr_target", "psnr_outside")}  # Fig. 2
BY_TURN = ("correct", "chain", "edited", "kept", "retained", *CURVES["drift"])
STORED = {...: {...: int | float | bool | None}}  # 1.metrics.json, ...: what was measured under each key
WIDE = 320  # px: larger pictures are scaled down to it in grids


@dataclass(frozen=True)
class Row:
    """One turn of one chain, and what was measured of it."""

    method: str
    seed: int
    item: Item
    turn: int  # from 1
    state: str  # "done", "failed": an error ended the chain here or before, "missing": not run yet
    result: TurnResult | None
    values: dict


class Figure(NamedTuple):
    name: str  # the file's, without its ending
    svg: str  # its content
    caption: str

    @property
    def uri(self) -> str:
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


class Picture(NamedTuple):
    uri: str
    about: str
    right: bool | None = None  # None: not known
    small: bool = True


class Grid(NamedTuple):
    """Pictures of one chain: a row for each method, the input first."""

    title: str
    heads: list[str]
    chains: list[tuple[str, list[Picture | str]]]  # a text stands where there is no picture


class Section(NamedTuple):
    title: str
    text: str
    parts: list[Table | Figure | Grid]


def report(
    run: Run,
    out: str | Path | None = None,
    clip: str | None = None,
    blip: str | None = None,
    lpips: bool = False,
    grids: int = 6,
    device: str = "cpu",
    clip2: str | None = None,
) -> Path:
    """Measure a run and write its report into a folder, RUN/report by default; the page's path.

    clip, blip: model names or folders of `metrics.ClipScorer` and `BlipScorer`; clip2: another CLIP, for a column
    beside the first's; grids: how many chains to show as pictures. Everything is compared with the first method of the
    run. Raises BenchError.
    """
    if blip and not clip:
        raise BenchError("BLIP scores compare texts by CLIP: give a CLIP model too (--clip)")
    out = run.path / "report" if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    scorers = {"clip": clip, "blip": blip, "lpips": lpips} | ({"clip2": clip2} if clip2 else {})
    results = Results(run, measure(run, scorers, device))
    sections = [what_was_run(results, scorers), how_good(results), against_the_first(results)]
    sections += [Section(*trust(results.methods, results.rows)), by_turn(results)]
    sections = [section for section in (*sections, pictures(results, grids), timing(results)) if section.parts]
    for part in (part for section in sections for part in section.parts if isinstance(part, Figure)):
        save(out / f"{part.name}.svg", part.svg)
    save(out / "metrics.csv", every_edit(results))
    title = f"{len(results.methods)} ways to edit, measured on {Path(run.info['bench']).name}"
    save(out / "report.md", markdown(title, results.unfinished, sections))
    page = out / "report.html"
    save(page, render("report.html", title=title, unfinished=results.unfinished, sections=sections))
    return page


# ---- measuring


def measure(run: Run, names: dict, device: str) -> list[Row]:
    """Every edit of a run with what can be said of it, in the order methods, seeds, items, turns.

    names: the arguments of `metrics.load_scorers`, whose networks are loaded when the first edit needs them.
    """
    from tqdm import tqdm

    scorers = cache(lambda: metrics.load_scorers(**names, device=device))
    chains = list(product(run.info["methods"], run.info["seeds"], run.items))
    rows = []
    with tqdm(total=sum(len(item.turns) for *_, item in chains), desc="measuring", unit="edit") as bar:
        for method, seed, item in chains:
            failed, right = False, True
            for turn in range(1, len(item.turns) + 1):
                result = run.outcome(method, seed, item.id, turn)
                failed = failed or bool(result and result.error)
                state = "failed" if failed else "missing" if result is None else "done"
                row = Row(method, seed, item, turn, state, result, {})
                if state != "missing":
                    row.values.update(_measured(run, row, names, scorers))
                    right = right and row.values.get("correct")
                    row.values.update({"chain": right} if item.turns[turn - 1].truth else {})
                rows.append(row)
                bar.update()
    return rows


def _measured(run: Run, row: Row, names: dict, scorers: Callable[[], metrics.Scorers]) -> dict:
    """What `metrics.measure_turn` says, from the disk where nothing that it depends on has changed since."""
    folder, item, turns = run.folder(row.method, row.seed, row.item.id), row.item, row.item.turns[: row.turn]
    before, after, first = folder / f"{row.turn - 1}.png", row.result and row.result.image, folder / "0.png"
    before = before if before.exists() else None  # the chain ended earlier
    files = [before, after, first, item.image, turns[-1].target, *(t.region or t.mask for t in turns)]
    asked = [names, item.caption, item.truth, [(t.instruction, t.caption, t.truth, t.within) for t in turns]]
    key = hashlib.sha256(repr(asked).encode())
    for path in (*files, Path(metrics.__file__), Path(judge.__file__)):
        key.update(hashlib.sha256(path.read_bytes()).digest() if path and path.exists() else b"none")
    store = folder / f"{row.turn}.metrics.json"
    try:
        known = read_json(store, STORED, "what was measured of an edit")
    except BenchError:
        known = {}  # not measured yet, or damaged: it is measured anew
    if key.hexdigest() in known:
        return known[key.hexdigest()]
    from ..canvas import images  # with which PyTorch comes

    pictures = [path and open_picture(path).convert("RGB") for path in (before, after, first)]
    size, target = pictures[-1].size, turns[-1].target
    if any(picture and picture.size != size for picture in pictures):
        raise BenchError(f"{folder}: its pictures have different sizes: remove this folder, and run it anew")
    turns = [replace(t, mask=None, target=None, region=working_mask(item, t.region or t.mask, size)) for t in turns]
    turns[-1] = replace(turns[-1], target=target and images.fit(images.read_image(target), size))
    values = metrics.measure_turn(metrics.Edit(*pictures, turns, item.caption, item.truth), scorers())
    write_bytes(json.dumps(known | {key.hexdigest(): values}).encode(), store)
    return values


# ---- counting


class Results:
    """The edits of a run, by method and metric."""

    def __init__(self, run: Run, rows: list[Row]):
        self.run, self.rows = run, rows
        self.methods, self.seeds = list(run.info["methods"]), run.info["seeds"]
        self.turns = max(len(item.turns) for item in run.items)
        self.at = {(row.method, row.seed, row.item.id, row.turn): row for row in rows}
        has = {name for row in rows for name, value in row.values.items() if value is not None}
        self.metrics = [name for name in KNOWN if name in has]
        self.interval, self.difference = cache(self._interval), cache(self._difference)

    @property
    def unfinished(self) -> str:
        """A line for a run that is not finished, else nothing."""
        missing = sum(row.state == "missing" for row in self.rows)
        line = (
            f"This run is not finished: {missing} of {len(self.rows)} edits still to be made. What follows is about "
            "the others. The same command, emilie bench run, goes on with it."
        )
        return line if missing else ""

    def values(self, method: str, metric: str, turn: int | None = None) -> dict[str, list[float | None]]:
        """{item: one value per seed and turn}; of one turn if given; of "chain" the last turn's."""
        out = {}
        for item in self.run.items:
            last = len(item.turns)
            first = last if metric == "chain" else 1
            turns = range(first, last + 1) if turn is None else [turn] if turn <= last else []
            out[item.id] = [self.at[method, s, item.id, t].values.get(metric) for s in self.seeds for t in turns]
        return out

    def _interval(self, method: str, metric: str, turn: int | None = None) -> Interval:
        pseudo = metrics.SHARE if KNOWN[metric].unit == "share" else ()
        return metrics.bootstrap(self.values(method, metric, turn), seeds=len(self.seeds), pseudo=pseudo)

    def _difference(self, a: str, b: str, metric: str) -> Interval:
        pseudo, seeds = metrics.SHARES_APART if KNOWN[metric].unit == "share" else (), len(self.seeds)
        return metrics.paired_bootstrap(self.values(a, metric), self.values(b, metric), seeds=seeds, pseudo=pseudo)

    def best(self, metric: str) -> str | None:
        """The method that beats every other in a metric, each by a paired interval without 0."""
        better = KNOWN[metric].better
        sign = 1 if better == "higher" else -1
        means = {m: sign * self.interval(m, metric).mean for m in self.methods if self.interval(m, metric).items}
        top = max(means, key=means.get, default=None)
        others = [self.difference(top, m, metric).verdict(better) for m in means if m != top]
        return top if others and set(others) == {"wins"} else None


def cell(interval: Interval, metric: str, best: bool = False) -> Value | None:
    """A table's cell; None where no item has a value."""
    if not interval.items:
        return None
    low, high = (None, None) if np.isnan(interval.low) else (interval.low, interval.high)
    unit = KNOWN[metric].unit
    return Value(interval.mean, low, high, {"share": 2, "grey levels": 2, "dB": 1}.get(unit, 3), best)


def heading(metric: str) -> str:
    known = KNOWN[metric]
    unit = f", {known.unit}" if known.unit not in ("", "share") else ""
    return f"{known.title}{unit} {'↑' if known.better == 'higher' else '↓'}"


def explained(names: list[str]) -> str:
    return " ".join(f"{KNOWN[name].title}: {KNOWN[name].what}." for name in names)


# ---- sections


def what_was_run(results: Results, scorers: dict) -> Section:
    run = results.run
    facts = {"run": str(run.path.resolve()), "items": len(run.items), **run.info, **scorers}
    facts = [(name, _setting(fact)) for name, fact in facts.items() if name != "methods" and fact]
    abouts = run.info["methods"]
    settings = list(dict.fromkeys(name for about in abouts.values() for name in about["settings"]))
    rows, failures = [], []
    for method, about in abouts.items():
        of = [row for row in results.rows if row.method == method]
        counts = [sum(row.state == state for row in of) for state in ("done", "failed", "missing")]
        given = (_setting(about["settings"].get(name, "")) for name in settings)
        rows.append((method, about["class"], *counts, *given))
        errors = [row for row in of if row.result and row.result.error]
        failures += [(method, row.seed, row.item.id, row.turn, row.result.error) for row in errors]
    note = (
        "Settings left empty are not the method's; none means the model's own. What failed or came after a failure in "
        "its chain counts as wrong where right and wrong are known, and is left out of measures of pictures."
    )
    columns = ("method", "class", "done", "failed", "missing", *settings)
    parts = [Table("The run", ("what", "which"), facts), Table("The methods and their edits", columns, rows, note)]
    if failures:
        parts.append(Table("Edits that ended their chain", ("method", "seed", "item", "turn", "error"), failures))
    return Section("What was run", "", parts)


def _setting(setting: object) -> str:
    return setting if isinstance(setting, str) else "none" if setting is None else json.dumps(setting)


def how_good(results: Results) -> Section:
    """Table 1."""
    parts = []
    for title, names in TABLES.items():
        if here := [metric for metric in names if metric in results.metrics]:
            best = {metric: results.best(metric) for metric in here}
            rows = [(m, *(cell(results.interval(m, k), k, best[k] == m) for k in here)) for m in results.methods]
            parts.append(Table(title, ("method", *map(heading, here)), rows, explained(here)))
    text = (
        "Each number is the mean over items of an item's mean over seeds and turns, with its 95% interval from a "
        "bootstrap over items and seeds; those of shares draw from two right and two wrong items more, so that 40 of "
        "40 are not certainty. Bold: better than every other method, each by a paired interval that leaves out 0. "
        f"Identical pictures count as {metrics.PSNR_CAP:.0f} dB."
    )
    return Section("Results", text, parts)


def against_the_first(results: Results) -> Section:
    """Where the first method wins, ties or loses."""
    first, rows = results.methods[0], []
    for other, metric in product(results.methods[1:], results.metrics):
        apart = results.difference(first, other, metric)
        if apart.items:
            means = (cell(results.interval(m, metric)._replace(low=np.nan), metric) for m in (first, other))
            verdict = apart.verdict(KNOWN[metric].better)
            rows.append((other, heading(metric), *means, cell(apart, metric), apart.items, verdict))
    note = (
        "The difference is taken value by value, on the same item, seed and turn, where both have one; items: those "
        "with such a pair. Wins and loses: the interval leaves out 0. Each interval stands for itself: where two "
        "methods do not differ, about one comparison in twenty says win or loss all the same."
    )
    columns = ("against", "metric", first, "the other", "difference", "items", first + ":")
    parts = [Table("Paired differences", columns, rows, note)] if rows else []
    return Section(f"Where {first} wins, ties and loses", "", parts)


def by_turn(results: Results) -> Section:
    """How right and wrong, and drift (Fig. 2), go over the turns of a chain."""
    parts, turns = [], range(1, results.turns + 1)
    for name, names in CURVES.items():
        if here := [metric for metric in names if metric in results.metrics]:
            caption = f"After each turn: means over items; bands: 95% intervals. {explained(here)}"
            parts.append(curves(results, name, here, caption))
    for metric in (metric for metric in BY_TURN if metric in results.metrics):
        rows = [(m, *(cell(results.interval(m, metric, turn), metric) for turn in turns)) for m in results.methods]
        counts = [max(results.interval(m, metric, turn).items for m in results.methods) for turn in turns]
        note = f"Items with a value, by turn: {', '.join(map(str, counts))}." if len(set(counts)) > 1 else ""
        title = "all pictures right up to a turn" if metric == "chain" else f"{KNOWN[metric].title}, by turn"
        columns = ("method", *(f"turn {turn}" for turn in turns))
        parts.append(Table(title[0].upper() + title[1:], columns, rows, note))
    text = (
        "How pictures fare and drift over a chain. What lies in none of the regions so far should stay as it was in "
        "the input; where they cover the whole picture nothing is left to compare."
    )
    return Section("Turn by turn", text, parts if results.turns > 1 else [])


def timing(results: Results) -> Section:
    rows = []
    for method in results.methods:
        seconds = [row.result.seconds for row in results.rows if row.method == method and row.state == "done"]
        middle = Value(float(np.median(seconds)), *np.percentile(seconds, (25, 75)).tolist()) if seconds else None
        rows.append((method, middle, len(seconds)))
    columns = ("method", "seconds per edit, median [quartiles]", "edits")
    note = "As the run measured them; on a machine that did other things as well they are too long."
    return Section("Time", "", [Table("Seconds", columns, rows, note)])


def pictures(results: Results, number: int) -> Section:
    """Fig. 6."""
    chosen = evenly_spaced(results.run.items, number) if number > 0 else []
    text = (
        f"{len(chosen)} of {len(results.run.items)} chains, evenly spaced, with seed {results.seeds[0]}. The outline "
        "is the mask that the edit used, given or found. ✓ and ✗, where it is known: whether the whole picture is what "
        "the instructions so far ask for."
    )
    return Section("Pictures", text, [grid(results, item) for item in chosen])


def grid(results: Results, item: Item) -> Grid:
    """A chain under the run's first seed."""
    seed, chains = results.seeds[0], []
    for method in results.methods:
        start = results.run.folder(method, seed, item.id) / "0.png"
        cells: list = [_picture(start, "the input") if start.exists() else "not run"]
        for turn in range(1, len(item.turns) + 1):
            row = results.at[method, seed, item.id, turn]
            if row.state == "done":
                about = f"{method}, turn {turn}"
                cells.append(_picture(row.result.image, about, row.result.mask, row.values.get("correct")))
            else:
                cells.append("failed" if row.state == "failed" else "not run")
        chains.append((method, cells))
    return Grid(f"Item {item.id}", ["input", *(f"{i}. {t.instruction}" for i, t in enumerate(item.turns, 1))], chains)


def _picture(path: Path, about: str, mask: Path | None = None, right: bool | None = None) -> Picture:
    image = open_picture(path).convert("RGB")
    uri = data_uri(image, open_picture(mask).convert("L") if mask else None, WIDE)
    return Picture(uri, about, right, max(image.size) <= SMALL)


# ---- files


def curves(results: Results, name: str, names: list[str], caption: str) -> Figure:
    """A panel for each metric: its mean over items by turn, one line a method, with bands for the intervals."""
    logging.getLogger("matplotlib").addHandler(logging.NullHandler())  # else it tells where its caches lie
    try:
        with patch.dict(os.environ):
            os.environ.pop("MPLBACKEND", None)  # of its windows, of which there is none
            import matplotlib
            from matplotlib import figure, ticker
    except ImportError as error:
        raise BenchError("figures need matplotlib: pip install 'emilie_min[bench]'") from error

    turns, methods = list(range(1, results.turns + 1)), results.methods
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9}
    with matplotlib.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        size = 4.2 * columns, 2.6 * rows + 0.3 + 0.22 * -(-len(methods) // 3)
        drawn = figure.Figure(figsize=size, layout="constrained")
        for metric, axes in zip(names, drawn.subplots(rows, columns, squeeze=False).flat):
            lines = []
            for j, method in enumerate(methods):
                intervals = [results.interval(method, metric, turn) for turn in turns]
                middle, low, high = ([getattr(v, part) for v in intervals] for part in ("mean", "low", "high"))
                dashes = ("-", "--", ":", "-.")[j // 10 % 4]
                lines += axes.plot(turns, middle, f"C{j % 10}{dashes}", marker="os^Dv"[j % 5], markersize=3.5)
                axes.fill_between(turns, low, high, color=f"C{j % 10}", alpha=0.8 / max(6, len(methods)), linewidth=0)
            axes.set_title(heading(metric), fontsize=9)
            axes.set_xlabel("turn")
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            if KNOWN[metric].unit == "share":
                axes.set_ylim(-0.03, 1.03)
        drawn.legend(lines, methods, loc="outside lower center", ncols=3, frameon=False)
        out = io.StringIO()
        drawn.savefig(out, format="svg", metadata={"Date": None})
    return Figure(name, out.getvalue(), caption)


def every_edit(results: Results) -> str:
    """metrics.csv: a line for each method, seed, item and turn; floats with 6 significant digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "seed", "item", "turn", "instruction", "state", "seconds", "error", *results.metrics])
    for row in results.rows:
        error, seconds = (row.result.error, row.result.seconds) if row.result else (None, None)
        asked, values = row.item.turns[row.turn - 1].instruction, [row.values.get(name) for name in results.metrics]
        measured = [v if v is None else f"{float(v):.6g}" for v in (seconds, *values)]
        writer.writerow(
            [row.method, row.seed, row.item.id, row.turn, asked, row.state, measured[0], error, *measured[1:]]
        )
    return out.getvalue()


def markdown(title: str, unfinished: str, sections: list[Section]) -> str:
    """The report without its pictures."""
    blocks = [f"# {escape_markdown(title)}", f"**{escape_markdown(unfinished)}**" if unfinished else ""]
    for section in sections:
        parts = [part for part in section.parts if not isinstance(part, Grid)]
        blocks += [f"## {escape_markdown(section.title)}", escape_markdown(section.text)] if parts else []
        for part in parts:
            if isinstance(part, Table):
                blocks.append(part.markdown().rstrip())
            else:
                name = escape_markdown(part.name)
                blocks.append(f"![{name}]({part.name}.svg)\n\n{escape_markdown(part.caption)}")
    return "\n\n".join(filter(None, blocks)) + "\n"
