"""What `run.run` found, as Markdown: on a CPU ratios first, and absolute times only with its name."""

from itertools import product
from statistics import median

PARTS = ("equality", "eager", "times", "profile", "memory", "sizes", "compiled_sizes", "tries")  # of --full, in turn
STAGES = ("step", "encode", "text", "sample", "decode", "edit")  # of what is timed
NOTES = """\
Figures are the median and (smallest to largest) of the repeats, in which all take turns. A step is one guided call of
the UNet, with the 3 B rows of a batch; an edit is encode + text + sample, of so many steps, + decode. FLOPs are counted
on the plain networks, attention included, also where a faster way does without some of them; the ceiling is a matrix
product's, the best of what was measured between the repeats ({ceilings} TFLOP/s). Ready: seconds until the first
outputs were there and compared, once per shape, torch.compile's work included. Weights: {weights}. Before anything was
timed all computed the same but for rounding: {errors}."""
MEMORY = """\
The most that was resident in a process of its own while it loaded, then while it computed one step, and an edit of 2
steps; all load emilie's weights, and diffusers shares them. CUDA: allocated (reserved) there; CUDA graphs show in the
latter. Ready: seconds of the first step and edit in that process, which finds what was compiled before."""
PROFILE = """\
Kernels by kind (on a CPU operators), and the gaps between them, in which a card waits for its next kernel."""


def markdown(result: dict) -> str:
    """The report; of a run that was cut off, what there is."""
    machine, setting, runs = result["machine"], result["setting"], [run for run in result["runs"] if run["ceiling"]]
    on = machine["name"] + ("" if machine["cuda"] else f", {machine['threads']} threads")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    held = {name: row["errors"] for run in reversed(runs) for name, row in list(run["backends"].items())[1:]}
    tops = [value / 1e12 for run in runs for value in run["ceiling"]]
    notes = NOTES.format(
        ceilings=f"{min(tops, default=0):.3g} to {max(tops, default=0):.3g}",
        weights=setting["weights"],
        errors=", ".join(f"{name} off by {max(row.values()):.1g}" for name, row in held.items()) or "one alone",
    )
    equality = [
        {"": name, "dtype": dtype, **{part: f"{error:.1g}" for part, error in row["errors"].items()}}
        for dtype, rows in result["equality"].items()
        for name, row in list(rows.items())[1:]
    ]
    seconds, ratios = table(f"Seconds, on {on}", seconds_rows(runs)), table("Time over another's", ratio_rows(runs))
    flops = [size(run) | {part: f"{n / 1e9:.4g}" for part, n in run["flops"].items()} for run in runs]
    tries = [
        {"": name or "as it is", "ready": f"{row['ready_s']:.1f}"}
        | {f"{stage}, ms": f"{1e3 * row['seconds'][stage]:.3g}" for stage in ("step", "encode", "decode")}
        for name, row in result["tries"].items()
    ]
    parts = [
        "# emilie speed",
        f"{on}; {machine['dtype']}, {setting['resolution']} px; {versions}; {machine['date']}",
        f"    {' '.join(machine['command'])}",
        "\n".join(f"- left out: {what}: {why}" for what, why in result["left_out"].items()),
        table("Relative difference to the first way", equality),
        *((seconds, ratios) if machine["cuda"] else (ratios, seconds)),
        table("GFLOP", [row for i, row in enumerate(flops) if row not in flops[:i]], notes),
        table("Where a step's time goes", profile_rows(result["profile"]), PROFILE),
        table("Memory, GB", memory_rows(result["memory"]), MEMORY),
        table("What else was tried, compiled", tries),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(title: str, rows: list[dict[str, str]], note: str = "") -> str:
    """A Markdown table of the columns that are not empty; nothing where there are no rows."""
    head = list(dict.fromkeys(key for row in rows for key in row if row[key]))
    lines = [head, ["---"] * len(head), *([row.get(key, "") for key in head] for row in rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title}\n\n{body}\n\n{note}".strip() if rows else ""


def spread(values: list[float]) -> str:
    low, middle, high = (f"{f(values):.3g}" if values else "" for f in (min, median, max))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def seconds_of(row: dict, stage: str) -> list[float]:
    """Of a stage in every repeat; none where it was not measured."""
    return [repeat[stage] for repeat in row["repeats"] if stage in repeat]


def size(run: dict) -> dict[str, str]:
    return {"px": str(run["resolution"]), "batch": str(run["batch"])}


def ratio_rows(runs: list[dict]) -> list[dict[str, str]]:
    """Time over another's in the same repeat, below 1 is faster: emilie's over diffusers', and over the first way's."""
    rows = []
    for run in runs:
        measured = {name: row for name, row in run["backends"].items() if row["repeats"]}
        ours = [name for name in measured if name.startswith("emilie")]
        others = [name for name in measured if name not in ours]
        for over, name in [*product(others, ours), *product(ours[:1], ours[1:])]:
            pairs = {stage: [seconds_of(measured[who], stage) for who in (name, over)] for stage in STAGES}
            ratios = {stage: spread([a / b for a, b in zip(*both)]) for stage, both in pairs.items()}
            rows.append({"": f"{name} / {over}", **size(run), **ratios})
    return rows


def seconds_rows(runs: list[dict]) -> list[dict[str, str]]:
    rows = []
    for run in runs:
        for name, row in run["backends"].items():
            seconds = {stage: seconds_of(row, stage) for stage in STAGES}
            if seconds["step"]:
                rate, edits = run["flops"]["step"] / median(seconds["step"]), seconds["edit"]
                rows.append({"": name, **size(run), "steps": str(run["steps"])})
                rows[-1] |= {stage: spread(values) for stage, values in seconds.items()}
                rows[-1] |= {"images/s": f"{run['batch'] / median(edits):.3g}" if edits else ""}
                rows[-1] |= {"TFLOP/s": f"{rate / 1e12:.3g}", "of ceiling": f"{100 * rate / max(run['ceiling']):.0f} %"}
                rows[-1] |= {"ready": f"{row['ready_s']:.1f}"}
    return rows


def profile_rows(profile: dict) -> list[dict[str, str]]:
    rows = []
    for name, row in profile.items():
        rows.append({"": name, "ms": f"{1e3 * row['step']:.3g}", "kernels": f"{row['kernels']:.0f}"})
        shares = {kind: row[kind] / row["step"] for kind in row if kind not in ("step", "kernels")}
        rows[-1] |= {kind: f"{100 * share:.0f} %" for kind, share in shares.items()}
    return rows


def memory_rows(memory: dict) -> list[dict[str, str]]:
    rows = []
    for name, row in memory.items():
        rows.append(
            {"": name, **{part: f"{row[part] / 1e9:.3g}" for part in ("loaded", "step", "edit") if part in row}}
        )
        cuda = {part: row[f"{part}_cuda"] for part in ("step", "edit") if f"{part}_cuda" in row}
        rows[-1] |= {f"CUDA: {part}": f"{a / 1e9:.3g} ({b / 1e9:.3g})" for part, (a, b) in cuda.items()}
        rows[-1] |= {"ready": f"{row['ready_s']:.1f}"}
    return rows
