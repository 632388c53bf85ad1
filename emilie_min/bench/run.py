"""Runs methods over a benchmark folder. Every finished edit is on disk at once, so a killed run goes on where it was.

    RUN/run.json                              what was run: methods and settings, seeds, models, versions
    RUN/edits/METHOD/SEED/ITEM/0.png          the input at working size; SEED is "any" where the method draws nothing
                              /1.png, ...     the picture after each turn
                              /1.safetensors  its latent, where the method has one
                              /1_mask.png     the mask that the edit used, if any
                              /1.json         seconds, notes, error, and the SHA-256 of the turn's files; written
                                              last: with it the turn is finished

A chain (one method, seed and item) depends on nothing but its inputs, so how chains are split over processes changes
no picture. Its noise follows from the seed and the item (`noise_seed`) and is the same for all methods: items are
independent of each other, and two methods differ by nothing but the method. An edit that fails ends its chain and is
tried again when the run is started again.
"""

import hashlib
import json
import platform
import re
import time
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path

from PIL import Image

from .. import __version__
from ..checkpoint.writing import atomic_write, write_bytes, write_tensors
from ..errors import BenchError, EmilieError, explain_oom, first_line, printable, quote
from . import data
from .io import open_picture, read_json

INFO = {  # run.json
    "bench": str,
    "bench_sha256": str,
    "methods": {...: {"class": str, "settings": dict}},
    "seeds": [int],
    "models": {...: {"name": str, "sha256": str | None}},
    "versions": {...: str},
    "noise?": str,  # what it is keyed by; absent: by the seed alone, as earlier versions had it
    "continued_with?": [{...: str}],  # other versions, if any
    "device": str,
    "dtype": str,
}
TURN = {"seconds": int | float, "notes": dict, "error": str | None, "files?": {...: str}}  # 1.json, ...


def slug(spec: str) -> str:
    """A method's name as a folder's; of a method from a file the file's name, without its folders."""
    return re.sub(r"[^A-Za-z0-9.=-]", "_", re.sub(r"^.*/(?=[^/]*\.py:)", "", spec))


def noise_seed(seed: int, item: str) -> int:
    """The seed of a chain's noise, 63 bits: SHA-256 of the run's seed and the item's id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {item}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Models:
    """What the methods run on; None: the small models that ship, the best device here, its usual type of numbers."""

    weights: str | Path | None = None  # of the model that follows instructions
    captions_weights: str | Path | None = None  # of the text-to-image model
    config: str | Path | None = None  # of `weights`; None: told by them
    device: str | None = None
    dtype: str | None = None
    tokenizer: str | Path | None = None  # CLIP's folder


SHIPPED = Models()


@dataclass(frozen=True)
class TurnResult:
    """What became of one turn: a picture, or an error."""

    image: Path | None
    mask: Path | None
    seconds: float
    error: str | None
    notes: dict
    files: dict[str, str]  # their SHA-256; of earlier versions' runs not known


@dataclass(frozen=True)
class Run:
    """A run's folder, read back."""

    path: Path
    info: dict  # run.json
    items: list[data.Item]

    def folder(self, method: str, seed: int, item: str) -> Path:
        seeded = self.info["methods"][method].get("seeded", True)
        return self.path / "edits" / slug(method) / (str(seed) if seeded else "any") / item

    def only(self, methods: list[str] | None) -> "Run":
        """The run as if it were of these methods alone, in this order; None = all. Raises BenchError."""
        known = self.info["methods"]
        if unknown := [method for method in methods or () if method not in known]:
            raise BenchError(f"{self.path} has no method {unknown[0]!r}, but: {', '.join(known)}")
        return replace(self, info=self.info | {"methods": {method: known[method] for method in methods or known}})

    def outcome(self, method: str, seed: int, item: str, turn: int) -> TurnResult | None:
        """Of turn 1, 2, ...; None where it has not been run. Raises BenchError."""
        folder = self.folder(method, seed, item)
        if not (folder / f"{turn}.json").exists():
            return None
        record = read_json(folder / f"{turn}.json", TURN, "the record of an edit")
        mask, error = folder / f"{turn}_mask.png", record["error"] and printable(record["error"])
        image = None if error else folder / f"{turn}.png"
        files = record.get("files") or {}
        return TurnResult(image, mask if mask.is_file() else None, record["seconds"], error, record["notes"], files)


def read_run(path: str | Path, methods: list[str] | None = None) -> Run:
    """A run's folder and the benchmark that it ran over; methods: only these, in this order. Raises BenchError."""
    path = Path(path)
    info = _read_info(path)
    items = data.read(info["bench"])
    if _sha256(Path(info["bench"]) / data.FILE) != info["bench_sha256"]:
        raise BenchError(f"{info['bench']} is not what {path} was run over: {data.FILE} has changed since")
    return Run(path, info, items).only(methods)


def _read_info(path: Path) -> dict:
    info = read_json(path / "run.json", INFO, "what `emilie bench run` writes into a run's folder")
    for name in (info["bench"], *info["methods"]):
        if not name.isprintable():
            raise BenchError(f"{path / 'run.json'} is damaged: it names {quote(name)}")
    return info


def state(run: Run) -> tuple[int, int]:
    """How many edits of a run are missing, and how many chains ended with an error."""
    missing = failed = 0
    for spec, seed, item in product(run.info["methods"], run.info["seeds"], run.items):
        results = [run.outcome(spec, seed, item.id, turn) for turn in range(1, len(item.turns) + 1)]
        error = any(result and result.error for result in results)
        failed += error
        missing += 0 if error else results.count(None)
    return missing, failed


def run(
    bench: str | Path,
    methods: list[str],
    out: str | Path,
    seeds: list[int] = (0,),
    models: Models = SHIPPED,
    shard: tuple[int, int] = (1, 1),
    **common: object,
) -> Run:
    """Every method on every item under every seed, or this process's share of it.

    methods: names for `methods.parse`; shard: (i, n), the i-th of n processes, from 1; common: settings such as steps
    or prompt for every method that has them and whose name does not set them.
    A run that exists is continued, and may be given further methods and seeds. Raises BenchError where it was made
    with other settings; an EmilieError of one edit is recorded and ends its chain.
    """
    from ..methods import parse

    items, out = data.read(bench), Path(out)
    if not methods or not seeds:
        raise BenchError("a run needs one method and one seed at least")
    if not 1 <= shard[0] <= shard[1]:
        raise BenchError(f"shard {shard[0]}/{shard[1]}: give i/n with i from 1 to n")
    if len({slug(spec) for spec in methods}) < len(methods):
        raise BenchError("two of the methods have the same name")
    parsed = {spec: parse(spec) for spec in methods}
    editors, about = _load({kind.needs for kind, _ in parsed.values()}, models)
    built = {}
    for spec, (kind, settings) in parsed.items():
        known = {field.name for field in fields(kind)}
        shared = {k: v for k, v in common.items() if k in known and v is not None}
        built[spec] = kind(editors[kind.needs], **shared | settings)
    editor = next(iter(editors.values()))
    info = {
        "bench": str(Path(bench).resolve()),
        "bench_sha256": _sha256(Path(bench) / data.FILE),
        "methods": {spec: _settings(method) for spec, method in built.items()},
        "seeds": sorted(set(seeds)),
        "models": about,
        "noise": "seed and item",
        "versions": _versions(),
        "device": editor.device.type,
        "dtype": str(editor.dtype).removeprefix("torch."),
        **common,
    }
    chains = list(product(info["seeds"], items))[shard[0] - 1 :: shard[1]]
    _work(Run(out, _record(out, info), items), built, chains)
    return read_run(out)


def _load(needed: set[str], models: Models) -> tuple[dict, dict]:
    """The editors of the roles "instructions" and "captions" that are needed, and what run.json says of each."""
    from .. import loading
    from ..checkpoint.download import hash_file

    editors, about = {}, {}
    for role in sorted(needed):
        if role == "captions":
            path, config, default = models.captions_weights, None, "toy-t2i"
        else:
            path, config, default = models.weights, models.config, "toy"
        path = loading.shipped(f"{default}.safetensors") if path is None else path
        config = default if path == "random" and config is None else config
        editors[role] = loading.load(path, config, models.device, models.dtype, models.tokenizer)
        about[role] = {"name": editors[role].model, "sha256": None if path == "random" else hash_file(path)}
    return editors, about


def _record(out: Path, info: dict) -> dict:
    """Write run.json, or add methods and seeds to the one that is there if all else agrees; what it says now."""
    path, info = out / "run.json", json.loads(json.dumps(info))  # as it reads back: of tuples become lists
    out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        old = _read_info(out)
        for part in ("models", "methods"):
            for name in old[part].keys() & info[part].keys():
                if info[part][name] | old[part][name] != info[part][name]:
                    raise BenchError(f"{out} was run with other {part} ({name}): choose another --out")
        for key in ("bench_sha256", "device", "dtype", "noise"):
            if old.get(key) != info[key]:
                raise BenchError(f"{out} was run with another {key} ({quote(old.get(key))}): choose another --out")
        versions = [old["versions"], *old.get("continued_with", []), info["versions"]]
        later = [v for i, v in enumerate(versions) if v not in versions[:i]][1:]
        info = old | {
            "bench": info["bench"],
            "methods": old["methods"] | {k: v for k, v in info["methods"].items() if k not in old["methods"]},
            "seeds": sorted({*old["seeds"], *info["seeds"]}),
            "models": old["models"] | info["models"],
            **({"continued_with": later} if later else {}),
        }
        if info == old:
            return info
    write_bytes(json.dumps(info, indent=1).encode(), path)
    return info


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
    folder.mkdir(parents=True, exist_ok=True)
    results = [run.outcome(spec, seed, item.id, turn) for turn in range(1, len(item.turns) + 1)]
    finished = next((i for i, result in enumerate(results) if result is None or result.error), len(results))
    bar.update(finished)
    if finished == len(results):
        return finished
    chain = method.open(item.image, noise_seed(seed, item.id))
    requests, before, size = [], item.caption, chain.original.size
    for turn in item.turns:
        mask = None if turn.mask is None else images.read_mask(turn.mask, size, size)
        requests.append(Request(turn.instruction, mask, turn.caption, before))
        before = turn.caption
    if finished:
        chain = _resume(method, chain, folder, tuple(requests[:finished]), results[finished - 1])
    else:
        _save_image(chain.image, folder / "0.png")
    for i, request in enumerate(requests[finished:], finished + 1):
        started, error = time.perf_counter(), None
        try:
            with explain_oom(f"in {spec}: lower the config's resolution"):
                chain = method.edit(chain, request)
        except EmilieError as e:
            error = printable(first_line(e))
            bar.write(f"{spec}, item {item.id}, seed {seed}, turn {i}: {error}")
        seconds = round(time.perf_counter() - started, 4)
        if not error:
            _save_image(chain.image, folder / f"{i}.png")
            if chain.latent is not None:
                write_tensors({"latent": chain.latent}, folder / f"{i}.safetensors", {})
            if chain.mask is not None:
                _save_image(chain.mask, folder / f"{i}_mask.png")
        notes, written = ({}, []) if error else (chain.notes, _files(folder, i))
        record = {"instruction": request.instruction, "seconds": seconds, "notes": notes, "error": error}
        record |= {"files": {path.name: _sha256(path) for path in written}} if written else {}
        write_bytes(json.dumps(record).encode(), folder / f"{i}.json")
        if error:
            return i - 1
        bar.update()
    return len(requests)


def _files(folder: Path, turn: int) -> list[Path]:
    """What there is of a turn, but for its record."""
    paths = [folder / f"{turn}{ending}" for ending in (".png", ".safetensors", "_mask.png")]
    return [path for path in paths if path.is_file()]


def _resume(method, chain, folder: Path, requests: tuple, last: TurnResult):
    """The chain as it stood after the last turn that is on disk. Raises BenchError where that is damaged."""
    turn = len(requests)
    found = {path.name: path for path in _files(folder, turn)}
    try:
        changed = [name for name in last.files if name not in found or _sha256(found[name]) != last.files[name]]
        if changed:
            raise ValueError(f"{quote(changed[0])} is not what was written")
        image = open_picture(folder / f"{turn}.png").convert("RGB")
        if image.size != chain.image.size:
            raise ValueError(f"its picture has {image.width}x{image.height} px")
        latent, mask = found.get(f"{turn}.safetensors"), found.get(f"{turn}_mask.png")
        return replace(
            chain,
            image=image,
            latent=None if latent is None else _read_latent(latent, method.editor, image.size),
            requests=requests,
            notes=last.notes,
            mask=None if mask is None else open_picture(mask).convert("L"),
        )
    except Exception as error:  # whatever a damaged file leads to
        wrong = f"{folder}: turn {turn} is damaged ({printable(first_line(error), 200)})"
        raise BenchError(f"{wrong}: remove this folder, and the chain is made anew") from error


def _read_latent(path: Path, editor, size: tuple[int, int]):
    """A latent of a picture of (width, height). Raises ValueError and what safetensors does."""
    from safetensors.torch import load_file

    latent, (width, height) = load_file(path)["latent"], (side // editor.vae.factor for side in size)
    if tuple(latent.shape) != (1, editor.config.diffusion.channels, height, width) or not latent.is_floating_point():
        raise ValueError("its latent has another size or type")
    if not latent.isfinite().all():
        raise ValueError("its latent is not finite")
    return latent


def _save_image(image: Image.Image, path: Path) -> None:
    with atomic_write(path) as f:
        image.save(f, format="PNG")


def _settings(method) -> dict:
    values = {field.name: getattr(method, field.name) for field in fields(method) if field.name != "editor"}
    about = {"class": type(method).__name__, "needs": method.needs, "settings": values}
    return about if method.seeded else about | {"seeded": False}


def _versions() -> dict:
    """Of the package by its own word, since a clone need not be installed."""
    others = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), "emilie_min": __version__} | others


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
