"""Whether scores by networks can be trusted: each against what the small world's truth says of the same edits.

Pooled: over all edits, AUC is the chance that an edit that was made (`edited`) scores higher than one that was not, and
the correlation is Pearson's of score and truth. Within an instruction: only edits of one item and turn are compared, by
all pairs of methods of which one made it, so that what differs between instructions drops out; its correlation is that
of what is left of score and truth when the mean over the methods is taken from each. Chance is 0.5 and 0. In brackets:
95% intervals from a bootstrap over items.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from ..toy import words, world
from .metrics import METRICS
from .page import Table, Value

SCORES = ("clip", "clip2", "clip_caption", "direction", "blip", "borne_out")
DRAWS = 1000
Groups = list[tuple[np.ndarray, np.ndarray]]  # of one item: of each turn, truths and scores of the methods


def trust(methods: Sequence[str], rows: Sequence) -> tuple[str, str, list[Table]]:
    """Title, text and tables of the report's section; without tables where no truth or no score is known."""
    done = [row for row in rows if row.state == "done" and row.values.get("edited") is not None]
    scores = [s for s in SCORES if any(row.values.get(s) is not None for row in done)]
    text = " ".join((__doc__ or "").split("\n\n", 1)[1].split())
    parts = [ranks(methods, done, scores), overall(done, scores), by_kind(done, scores)] if scores else []
    return "How far the scores can be trusted", text, parts


def ranks(methods: Sequence[str], rows: Sequence, scores: list[str]) -> Table:
    """The methods by truth and by each score."""

    def mean(method: str, name: str) -> float:
        return float(np.mean([row.values[name] for row in rows if row.method == method and name in row.values]))

    here = [m for m in methods if any(row.method == m for row in rows)]
    means = {name: [mean(m, name) for m in here] for name in ("edited", "correct", *scores)}
    order = sorted(range(len(here)), key=lambda i: -means["edited"][i])
    table = [(here[i], *(Value(means[k][i], digits=3) for k in means)) for i in order]
    agree = [spearman(means["edited"], means[k]) for k in scores]
    table.append(
        ("rank correlation with edited", None, None, *(None if np.isnan(r) else Value(r, digits=2) for r in agree))
    )
    columns = ("method", *(METRICS[k].title for k in means))
    return Table("The methods' means, by truth and by score", columns, table)


def overall(rows: Sequence, scores: list[str]) -> Table:
    table = []
    for score in scores:
        items = grouped(rows, score)
        pooled = [interval(items, of) for of in (pooled_auc, pooled_correlation)]
        found = [*pooled, paired(items), interval(items, within_correlation)]
        n = sum(len(t) for groups in items for t, _ in groups)
        table.append((METRICS[score].title, n, *found))
    note = (
        "What each is: " + " ".join(f"{METRICS[s].title}: {METRICS[s].what}." for s in scores) + " A share counts "
        "ties for half."
    )
    columns = (
        "score",
        "edits",
        "AUC, pooled",
        "correlation, pooled",
        "pairs within",
        "correlation within",
    )
    return Table("Each score against the truth: was the edit made?", columns, table, note)


def by_kind(rows: Sequence, scores: list[str]) -> Table:
    """Pairs within an instruction, by its kind."""
    known = set(world.instructions())
    table = []
    for kind in world.KINDS:
        of = [r for r in rows if (told := instruction(r)) in known and words.kind(told) == kind]
        counted = sum(pairs_of(groups)[1] for groups in grouped(of, scores[0])) if of else 0
        table.append((kind, int(counted), *(paired(grouped(of, score)) for score in scores)))
    columns = ("kind", "pairs", *(METRICS[s].title for s in scores))
    note = "The share of pairs, of one instruction, of which the edit that was made scores higher."
    return Table("Pairs within an instruction, by its kind", columns, table, note)


def instruction(row) -> str:
    return row.item.turns[row.turn - 1].instruction


# ---- statistics


def grouped(rows: Sequence, score: str) -> list[Groups]:
    """Truths and scores by item, and there by turn and seed."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.values.get(score) is not None:
            found[row.item.id][row.turn, row.seed].append((row.values["edited"], row.values[score]))
    return [[tuple(np.array(each, float).T) for each in turns.values()] for turns in found.values()]


def interval(items: list[Groups], statistic: Callable[[list[Groups]], float]) -> Value | None:
    """A statistic over items, with its interval; None where there is none."""
    value, rng = statistic(items), np.random.default_rng(0)
    if np.isnan(value):
        return None
    drawn = [statistic([items[i] for i in rng.integers(len(items), size=len(items))]) for _ in range(DRAWS)]
    return Value(value, *np.nanpercentile(drawn, (2.5, 97.5)).tolist(), 2)


def flat(items: list[Groups]) -> tuple[np.ndarray, np.ndarray]:
    groups = [group for item in items for group in item]
    truths, scores = ([each[k] for each in groups] or [np.zeros(0)] for k in (0, 1))
    return np.concatenate(truths), np.concatenate(scores)


def pooled_auc(items: list[Groups]) -> float:
    truth, score = flat(items)
    return auc(score[truth > 0], score[truth == 0])


def pooled_correlation(items: list[Groups]) -> float:
    return correlation(*flat(items))


def paired(items: list[Groups]) -> Value | None:
    """The share of pairs within an instruction of which the edit that was made wins, with its interval."""
    counts = np.array([pairs_of(groups) for groups in items]).reshape(-1, 2)
    if not counts[:, 1].sum():
        return None
    won, of = counts[np.random.default_rng(0).integers(len(counts), size=(DRAWS, len(counts)))].sum(1).T
    drawn = won[of > 0] / of[of > 0]
    return Value(float(np.divide(*counts.sum(0))), *np.percentile(drawn, (2.5, 97.5)).tolist(), 2)


def pairs_of(groups: Groups) -> tuple[float, int]:
    """How many pairs the edit that was made wins, and of how many."""
    won, of = 0.0, 0
    for truth, score in groups:
        for a, b in product(score[truth > 0], score[truth == 0]):
            won, of = won + (a > b) + 0.5 * (a == b), of + 1
    return won, of


def within_correlation(items: list[Groups]) -> float:
    centred = [[(t - t.mean(), s - s.mean()) for t, s in groups] for groups in items]
    return correlation(*flat(centred))


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """The share of pairs of a right and a wrong one in which the right one is higher; ties count half."""
    from scipy import stats

    if not len(right) or not len(wrong):
        return float("nan")
    places = stats.rankdata(np.concatenate([right, wrong]))[: len(right)]
    return float((places.sum() - len(right) * (len(right) + 1) / 2) / (len(right) * len(wrong)))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN where one does not vary."""
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: list[float], b: list[float]) -> float:
    from scipy import stats

    return correlation(stats.rankdata(a), stats.rankdata(b))
