"""The exercises: open they run and say so, the solutions are marked right, and what is wrong is marked and seen."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
CELLS = json.loads((FOLDER / "exercises.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
NAMES = [source.rsplit("marking.", 1)[1].split("(")[0] for source in ("".join(c["source"]) for c in CODE[1:])]

WRONG = {
    "sigma_table": [lambda beta: beta.sqrt(), lambda beta: (1 - torch.cumprod(1 - beta, 0)) ** 0.5],
    "stack": [
        lambda x, sigma, z_img: torch.cat([x, z_img], 1),
        lambda x, sigma, z_img: torch.cat([z_img, x / (1 + sigma**2) ** 0.5], 1),
    ],
    "guide": [
        lambda c, i, u, s_t, s_i: u + s_t * (c - u) + s_i * (i - u),
        lambda c, i, u, s_t, s_i: i + s_t * (c - i),
    ],
    "ancestral_split": [lambda a, b: (b, 0.0), lambda a, b: (b / 2**0.5, b / 2**0.5)],
    "step": [
        lambda x, eps, a, down, up, n: x - eps + up * n,
        lambda x, eps, a, down, up, n: x + (down - a) * eps,
    ],
    "langevin": [
        lambda z, g, lam, n: z + lam / 2 * g + lam**0.5 * n,
        lambda z, g, lam, n: z - lam / 2 * g,
        lambda z, g, lam, n: z - lam / 2 * g + lam * n,
    ],
    "eq8": [lambda eps, mask: (1 - mask) * eps, lambda eps, mask: eps],
    "factor": [
        lambda again, z: (z.abs().mean() / again.abs().mean()).item(),
        lambda again, z: (again.mean() / z.mean()).item(),
        lambda again, z: 1.0,
    ],
    "iterate": [
        lambda editor, z, way: z if way == "latent" else editor.encode(editor.decode(z)),
        lambda editor, z, way: editor.encode(editor.decode(z)) if way == "latent" else z / editor.scale_factor,
    ],
    "own_gate": [
        lambda mask, source: lambda eps, x, sigma: mask * eps,
        lambda mask, source: lambda eps, x, sigma: eps,
    ],
}


@pytest.fixture(scope="module")
def notebooks():
    """The folder's modules, imported as the notebooks do, with figures kept instead of shown."""
    pytest.importorskip("matplotlib", reason="exercises need matplotlib: pip install 'emilie_min[notebooks]'")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    old, grad, params, show = Path.cwd(), torch.is_grad_enabled(), matplotlib.rcParams.copy(), plt.show
    sys.path.insert(0, str(FOLDER))
    import marking
    import solutions

    figures = []

    plt.show = lambda: figures.append(plt.gcf())
    yield SimpleNamespace(marking=marking, solutions=solutions, figures=figures)
    plt.show = show
    plt.close("all")
    matplotlib.rcParams.update(params)
    sys.path.remove(str(FOLDER))
    os.chdir(old)
    torch.set_grad_enabled(grad)


def mark(notebooks, name, answer):
    """What is printed, and the figures as arrays."""
    notebooks.figures.clear()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        getattr(notebooks.marking, name)(answer)
    return out.getvalue(), [drawn(figure) for figure in notebooks.figures]


def drawn(figure):
    from matplotlib import pyplot as plt

    figure.set_dpi(30)
    figure.canvas.draw()
    pixels = np.array(figure.canvas.buffer_rgba(), float)[..., :3]
    plt.close(figure)
    return pixels


def test_there_are_ten_and_each_has_a_solution(notebooks):
    assert len(NAMES) == len(set(NAMES)) == 10 and WRONG.keys() == set(NAMES)
    assert all(hasattr(notebooks.solutions, name) for name in NAMES)


def test_open_they_run_and_say_what_is_committed(notebooks):
    space = {}
    for number, cell in enumerate(CODE):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec("".join(cell["source"]), space)
        committed = "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")
        assert out.getvalue() == committed == (f"exercise {number}: not answered yet\n" if number else "")
        assert bool(number) == any("image/png" in o.get("data", {}) for o in cell["outputs"])


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_is_right_and_what_is_wrong_is_marked_and_seen(notebooks, name):
    number = NAMES.index(name) + 1
    said, right = mark(notebooks, name, getattr(notebooks.solutions, name))
    assert said.startswith(f"exercise {number}: right")
    for k, answer in enumerate(WRONG[name]):
        said, wrong = mark(notebooks, name, answer)
        assert said.startswith(f"exercise {number}: wrong")
        changed = max(float((abs(a - b).max(-1) > 40).mean()) for a, b in zip(wrong, right))
        assert changed > 0.01, f"wrong answer {k}: {changed:.2%} of the figure differs"


def test_a_wrong_shape_is_told(notebooks):
    said, _ = mark(notebooks, "stack", lambda x, sigma, z_img: z_img)
    assert said == "exercise 2: wrong: the shape is (1, 4, 16, 16), not (1, 8, 16, 16)\n"
