"""The preference study (Tables 2 and 3): a page that shows methods' results side by side, blinded, and its tally.

`study` writes two files: `study.html`, for the raters, and `study_key.json`, which alone knows what method made which
picture and is kept back for `tally`. The page needs nothing but a browser; its answers are a file that it downloads.
"""

import hashlib
import json
import secrets
from pathlib import Path

import numpy as np

from ..errors import BenchError, quote
from .io import open_picture, read_json
from .metrics import percentiles
from .page import Table, Value, data_uri, evenly_spaced, render, save, working_mask
from .run import Run

NO_DIFFERENCE = "no difference"
KEY = {"page": str, "methods": [str], "chains": {...: {"item": str, "results": {...: str}}}}
ANSWERS = {"page": str, "rater": str, "choices": [{"chain": str, "chosen": list}]}


def study(
    run: Run, out: str | Path, methods: list[str] | None = None, chains: int | None = None, seed: int = 0
) -> tuple[Path, Path, str]:
    """Write a page with one question per item into a folder: (page, key, a line on what it shows).

    methods: names of the run's, None = all; chains: how many, evenly spaced, None = all; seed: of the order in which a
    rater sees items and results, with the rater's own name. Pictures are of the run's first seed. An item counts only
    where every method has a picture after the last turn. Raises BenchError.
    """
    out = Path(out)
    page, key = out / "study.html", out / "study_key.json"
    methods = list(run.only(methods).info["methods"])
    if len(methods) < 2:
        raise BenchError("a preference needs two methods or more")
    if chains is not None and chains < 1:
        raise BenchError(f"a study needs one chain or more, not {chains}")
    if key.exists():
        raise BenchError(f"{key} is there already, and answers to its page need it: choose another --out")
    first = run.info["seeds"][0]
    whole = [item for item in run.items if all(_finished(run, method, first, item) for method in methods)]
    if not whole:
        raise BenchError(f"{run.path} has no item that all of {', '.join(methods)} have finished under seed {first}")
    chosen = evenly_spaced(whole, len(whole) if chains is None else chains)
    questions, secret = [], {}
    for item in chosen:
        results, names = [], {}
        for method in methods:
            name = secrets.token_hex(6)
            names[name] = method
            pictures = [run.outcome(method, first, item.id, turn + 1).image for turn in range(len(item.turns))]
            results.append(
                {"key": name, "pictures": [data_uri(open_picture(path).convert("RGB")) for path in pictures]}
            )
        start = open_picture(run.folder(methods[0], first, item.id) / "0.png").convert("RGB")
        turns = [
            {"text": turn.instruction, "where": mask and data_uri(start, mask)}
            for turn in item.turns
            for mask in [working_mask(item, turn.mask, start.size)]
        ]
        chain = secrets.token_hex(6)
        results.sort(key=lambda result: result["key"])
        questions.append({"key": chain, "input": data_uri(start), "turns": turns, "results": results})
        secret[chain] = {"item": item.id, "results": names}
    questions.sort(key=lambda question: question["key"])
    content = {"seed": seed, "chains": questions}
    content["page"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    about = {"page": content["page"], "run": str(run.path.resolve()), "run_seed": first, "seed": seed}
    out.mkdir(parents=True, exist_ok=True)
    save(key, json.dumps(about | {"methods": methods, "chains": secret}, indent=1))
    save(page, render("study.html", content=content))
    left_out = len(run.items) - len(whole)
    message = f"{len(chosen)} items, {len(methods)} methods" + (
        f"; {left_out} items lack a picture" if left_out else ""
    )
    return page, key, message


def _finished(run: Run, method: str, seed: int, item) -> bool:
    last = run.outcome(method, seed, item.id, len(item.turns))
    return last is not None and last.image is not None


def tally(key: str | Path, answers: list[str | Path]) -> Table:
    """How the raters' votes split over the methods, in percent of all votes.

    A vote for several methods as equally good is split between them; "no difference" is a row of its own. The
    intervals are from a bootstrap over chains, since votes on one chain are not independent of each other. Where all
    chains agree it has nothing to vary, and Wilson's interval for as many chains stands in. Raises BenchError for
    files that are not of this page, or count twice.
    """
    secret = read_json(key, KEY, "the key that `emilie bench study` wrote beside the page")
    methods, known = secret["methods"], {chain: about["results"] for chain, about in secret["chains"].items()}
    if strangers := {method for results in known.values() for method in results.values()} - set(methods):
        raise BenchError(f"{key} is damaged: {quote(min(strangers))} is none of its methods")
    if not answers:
        raise BenchError("no answers: give the files that the page downloaded")
    votes, raters = {}, {}  # chain -> one dict of shares per rater; rater -> file
    for path in map(Path, answers):
        rater, choices = _answers(path, secret["page"], known)
        if rater in raters:
            raise BenchError(f"{path} and {raters[rater]} are both of rater {quote(rater)}: keep the one that counts")
        raters[rater] = path
        for chain, chosen in choices.items():
            undecided = len(chosen) in (0, len(known[chain]))
            shares = {NO_DIFFERENCE: 1.0} if undecided else {known[chain][name]: 1 / len(chosen) for name in chosen}
            votes.setdefault(chain, []).append(shares)
    rows = []
    for name in (*methods, NO_DIFFERENCE):
        shares = [[vote.get(name, 0.0) for vote in chain] for chain in votes.values()]
        alone = sum(chain.count(1) for chain in shares)
        rows.append((name, _share(shares), alone, sum(share > 0 for chain in shares for share in chain) - alone))
    counts = f"{sum(map(len, votes.values()))} votes of {len(raters)} raters on {len(votes)} of {len(known)} chains."
    note = (
        f"{counts} A vote for several as equally good is split between them. Intervals: 95%, bootstrap over chains "
        "(votes on one chain are not independent); where all chains agree, Wilson's for as many chains."
    )
    return Table("Preferred method", ("method", "votes, %", "votes alone", "votes shared"), rows, note)


def _answers(path: Path, page: str, known: dict[str, dict]) -> tuple[str, dict[str, list[str]]]:
    """A rater's name, and the results that the rater chose of each chain. Raises BenchError."""
    given, choices = read_json(path, ANSWERS, "a file of answers that a study's page downloaded"), {}
    if given["page"] != page:
        raise BenchError(f"{path} answers another page than this key's")
    for choice in given["choices"]:
        chain, chosen = choice["chain"], choice["chosen"]
        if chain not in known:
            raise BenchError(f"{path} answers for a chain that the page does not have: {quote(chain)}")
        if unknown := [name for name in chosen if name not in list(known[chain])]:
            raise BenchError(f"{path} chooses a result that chain {quote(chain)} does not have: {quote(unknown[0])}")
        if chain in choices or len(set(chosen)) < len(chosen):
            raise BenchError(f"{path} answers twice for chain {quote(chain)}")
        choices[chain] = chosen
    return given["rater"], choices


def _share(chains: list[list[float]]) -> Value:
    """The mean over all votes, in percent, with its interval; chains: the shares of the votes on each."""
    sums, counts = np.array([sum(chain) for chain in chains]), np.array([len(chain) for chain in chains])
    p, n, z = sums.sum() / counts.sum(), len(chains), 1.96
    if np.ptp(sums / counts) > 1e-9:
        low, high = percentiles(lambda votes, of, axis: votes.sum(axis) / of.sum(axis), sums, counts)
    else:
        centre, reach = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        low, high = ((centre + side * reach) / (1 + z**2 / n) for side in (-1, 1))
    return Value(*(float(100 * v) for v in (p, low, high)), digits=1)
