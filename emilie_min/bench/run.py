"""Runs methods over a benchmark folder. Every finished edit is on disk at once, so a killed run goes on where it was.

    RUN/run.json                              what was run: methods and settings, seeds, models, versions
    RUN/edits/METHOD/SEED/ITEM/0.png          the input at working size
                              /1.png, ...     the picture after each turn
                              /1.safetensors  its latent, where the method has one
                              /1_mask.png     the mask that the edit used, if any
                              /1.json         seconds, notes, error; written last: with it the turn is finished

A chain (one method, seed and item) depends on nothing but its inputs, so how chains are split over processes changes
no picture. An edit that fails ends its chain and is tried again when the run is started again.
"""

import hashlib
import json
import platform
import re
import shutil
import time
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from ..checkpoint.writing import atomic_write, write_bytes, write_tensors
from ..errors import BenchError, EmilieError, explain_oom
from . import data


def slug(spec: str) -> str:
    """A method's name as a folder's; of a method from a file the file's name, without its folders."""
    return re.sub(r"[^A-Za-z0-9.=-]", "_", re.sub(r"^.*/(?=[^/]*\.py:)", "", spec))


@dataclass(frozen=True)
class Outcome:
    """What became of one turn: a picture, or an error."""

    image: Path | None
    mask: Path | None
    seconds: float | None
    error: str | None
    notes: dict


@dataclass(frozen=True)
class Run:
    """A run's folder, read back."""

    path: Path
    info: dict  # run.json
    items: list[data.Item]

    def folder(self, method: str, seed: int, item: str) -> Path:
        return self.path / "edits" / slug(method) / str(seed) / item

    def only(self, methods: list[str] | None) -> "Run":
        """The run as if it were of these methods alone, in this order; None = all. Raises BenchError."""
        known = self.info["methods"]
        if unknown := [method for method in methods or () if method not in known]:
            raise BenchError(f"{self.path} has no method {unknown[0]!r}, but: {', '.join(known)}")
        return replace(self, info=self.info | {"methods": {method: known[method] for method in methods or known}})

    def outcome(self, method: str, seed: int, item: str, turn: int) -> Outcome | None:
        """Of turn 1, 2, ...; None where it has not been run."""
        folder = self.folder(method, seed, item)
        try:
            record = json.loads((folder / f"{turn}.json").read_text())
        except FileNotFoundError:
            return None
        mask = folder / f"{turn}_mask.png"
        return Outcome(
            None if record["error"] else folder / f"{turn}.png",
            mask if mask.is_file() else None,
            record["seconds"],
            record["error"],
            record["notes"],
        )


def read_run(path: str | Path, methods: list[str] | None = None) -> Run:
    """A run's folder and the benchmark that it ran over; methods: only these, in this order. Raises BenchError."""
    path = Path(path)
    try:
        info = json.loads((path / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} is no run: `emilie bench run DIR --out {path}` makes one ({error})") from error
    items = data.read(info["bench"])
    if _sha256(Path(info["bench"]) / "bench.jsonl") != info["bench_sha256"]:
        raise BenchError(f"{info['bench']} is not what {path} was run over: bench.jsonl has changed since")
    return Run(path, info, items).only(methods)


def state(run: Run) -> tuple[int, int]:
    """How many edits of a run are missing, and how many chains ended with an error."""
    missing = failed = 0
    for spec in run.info["methods"]:
        for seed in run.info["seeds"]:
            for item in run.items:
                outcomes = [run.outcome(spec, seed, item.id, turn) for turn in range(1, len(item.turns) + 1)]
                error = any(outcome and outcome.error for outcome in outcomes)
                failed += error
                missing += 0 if error else outcomes.count(None)
    return missing, failed


def run(
    bench: str | Path,
    methods: list[str],
    out: str | Path,
    seeds: list[int] = (0,),
    weights: str | Path | None = None,
    captions_weights: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    shard: tuple[int, int] = (1, 1),
    **common: object,
) -> Run:
    """Every method on every item under every seed, or this process's share of it.

    methods: names for `methods.parse`; weights: of the model that follows instructions, None = the small one that
    ships; captions_weights: of the text-to-image model, likewise; shard: (i, n), the i-th of n processes, from 1.
    common: settings such as steps or prompt for every method that has them and whose name does not set them.
    A run that exists is continued, and may be given further methods and seeds. Raises BenchError where it was made
    with other settings; an EmilieError of one edit is recorded and ends its chain.
    """
    from ..methods import parse

    items, out = data.read(bench), Path(out)
    if not 1 <= shard[0] <= shard[1]:
        raise BenchError(f"shard {shard[0]}/{shard[1]}: give i/n with i from 1 to n")
    if len({slug(spec) for spec in methods}) < len(methods):
        raise BenchError("two of the methods have the same name")
    parsed = {}
    for spec in methods:
        kind, settings = parse(spec)
        known = {field.name for field in fields(kind)}
        parsed[spec] = kind, {k: v for k, v in common.items() if k in known and v is not None} | settings
    needed = sorted({kind.needs for kind, _ in parsed.values()})
    editors, models = _load(needed, {"instructions": weights, "captions": captions_weights}, device, dtype, tokenizer)
    built = {spec: kind(editors[kind.needs], **settings) for spec, (kind, settings) in parsed.items()}
    info = {
        "bench": str(Path(bench).resolve()),
        "bench_sha256": _sha256(Path(bench) / "bench.jsonl"),
        "methods": {spec: _settings(method) for spec, method in built.items()},
        "seeds": sorted(set(seeds)),
        "models": models,
        "versions": _versions(),
        "device": editors[needed[0]].device.type,
        "dtype": str(editors[needed[0]].dtype).removeprefix("torch."),
        **common,
    }
    _record(out, info)
    chains = [(seed, item) for seed in info["seeds"] for item in items][shard[0] - 1 :: shard[1]]
    _work(Run(out, info, items), built, chains)
    return read_run(out)


def _load(needed: list[str], weights: dict, device, dtype, tokenizer) -> tuple[dict, dict]:
    from .. import loading
    from ..checkpoint.download import hash_file

    editors, models = {}, {}
    for role in needed:
        path = weights[role]
        if path is None:
            path = loading.shipped("toy.safetensors" if role == "instructions" else "toy-t2i.safetensors")
        config = "toy-t2i" if path == "random" and role == "captions" else None
        editors[role] = loading.load(path, config, device, dtype, tokenizer)
        digest = None if path == "random" else hash_file(path)
        models[role] = {"name": editors[role].model, "sha256": digest}
    return editors, models


def _record(out: Path, info: dict) -> None:
    """Write run.json, or add methods and seeds to the one that is there if all else agrees."""
    path, versions = out / "run.json", info["versions"]
    out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        old = json.loads(path.read_text())
        for role in old["models"].keys() & info["models"].keys():
            if old["models"][role] != info["models"][role]:
                raise BenchError(
                    f"{out} was run with {old['models'][role]['name']}, other weights: choose another --out"
                )
        for spec in old["methods"].keys() & info["methods"].keys():
            if old["methods"][spec] != info["methods"][spec]:
                raise BenchError(f"{out} has {spec} with other settings: choose another --out")
        for key in ("bench_sha256", "device", "dtype"):
            if old[key] != info[key]:
                raise BenchError(f"{out} was run with another {key} ({old[key]}): choose another --out")
        info = old | {
            "bench": info["bench"],
            "methods": old["methods"] | info["methods"],
            "seeds": sorted({*old["seeds"], *info["seeds"]}),
            "models": old["models"] | info["models"],
        }
        if versions not in (old["versions"], *old.get("continued_with", [])):
            info["continued_with"] = [*old.get("continued_with", []), versions]
        if info == old:
            return
    write_bytes(json.dumps(info, indent=1).encode(), path)


def _work(run: Run, methods: dict, chains: list[tuple[int, data.Item]]) -> None:
    from tqdm import tqdm

    total = len(methods) * sum(len(item.turns) for _, item in chains)
    with tqdm(total=total, unit="edit") as bar:
        for seed, item in chains:
            for spec, method in methods.items():
                bar.set_postfix_str(f"{Path(spec).name} {item.id} seed {seed}", refresh=False)
                finished = _chain(run, spec, method, seed, item, bar)
                bar.update(len(item.turns) - finished)  # an error ended it


def _chain(run: Run, spec: str, method, seed: int, item: data.Item, bar) -> int:
    """All turns of a chain that are not on disk yet. The number of turns that are finished."""
    from ..canvas import images
    from ..methods import Request

    folder = run.folder(spec, seed, item.id)
    if not method.seeded and not folder.exists():  # what another seed gave is what this one would give
        for other in (run.folder(spec, other, item.id) for other in run.info["seeds"]):
            if (other / f"{len(item.turns)}.json").exists():
                shutil.copytree(other, folder.with_name(f".{item.id}.partial"), dirs_exist_ok=True)
                folder.with_name(f".{item.id}.partial").rename(folder)
                break
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [run.outcome(spec, seed, item.id, turn) for turn in range(1, len(item.turns) + 1)]
    finished = next((i for i, outcome in enumerate(outcomes) if outcome is None or outcome.error), len(outcomes))
    bar.update(finished)
    if finished == len(outcomes):
        return finished
    chain = method.open(item.image, seed)
    requests, before = [], item.caption
    for turn in item.turns:
        size = chain.original.size
        mask = None if turn.mask is None else images.read_mask(turn.mask, size, size)
        requests.append(Request(turn.instruction, mask, turn.caption, before))
        before = turn.caption
    if finished:
        chain = _resume(chain, folder, finished, tuple(requests[:finished]))
    else:
        _save_image(chain.image, folder / "0.png")
    for i, request in enumerate(requests[finished:], finished + 1):
        started, error = time.perf_counter(), None
        try:
            with explain_oom(f"in {spec}: lower the config's resolution"):
                chain = method.edit(chain, request)
        except EmilieError as e:
            error = str(e)
            bar.write(f"{spec}, item {item.id}, seed {seed}, turn {i}: {error}")
        else:
            _save_image(chain.image, folder / f"{i}.png")
            if chain.latent is not None:
                write_tensors({"latent": chain.latent}, folder / f"{i}.safetensors", {})
            if chain.mask is not None:
                _save_image(chain.mask, folder / f"{i}_mask.png")
        record = {
            "instruction": request.instruction,
            "seconds": round(time.perf_counter() - started, 4),
            "notes": {} if error else chain.notes,
            "error": error,
        }
        write_bytes(json.dumps(record).encode(), folder / f"{i}.json")
        if error:
            return i - 1
        bar.update()
    return len(requests)


def _resume(chain, folder: Path, turn: int, requests: tuple):
    """The chain as it stood after a turn that is on disk."""
    from safetensors.torch import load_file

    latent = folder / f"{turn}.safetensors"
    mask = folder / f"{turn}_mask.png"
    return replace(
        chain,
        image=Image.open(folder / f"{turn}.png").convert("RGB"),
        latent=load_file(latent)["latent"] if latent.is_file() else None,
        requests=requests,
        mask=Image.open(mask).convert("L") if mask.is_file() else None,
    )


def _save_image(image: Image.Image, path: Path) -> None:
    with atomic_write(path) as f:
        image.save(f, format="PNG")


def _settings(method) -> dict:
    values = {field.name: getattr(method, field.name) for field in fields(method) if field.name != "editor"}
    return {"class": type(method).__name__, "needs": method.needs, "settings": values}


def _versions() -> dict:
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("emilie_min", "torch", "transformers")
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
