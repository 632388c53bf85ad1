"""What the notebooks share: pictures in rows, latents made visible, distances, and the package's source quoted.

Importing it makes the clone the working directory, switches gradients off and sets the figures' style.
"""

import inspect
import os
import textwrap
import warnings
from collections.abc import Iterable
from pathlib import Path

warnings.filterwarnings("ignore", "IProgress")  # about Jupyter's own progress bars, when they are first imported

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from emilie_min.canvas import images  # noqa: E402
from emilie_min.canvas.strip import outlined  # noqa: E402
from emilie_min.emilie import Editor  # noqa: E402

os.chdir(Path(__file__).resolve().parent.parent)
torch.set_grad_enabled(False)
plt.rcParams.update({"figure.dpi": 72, "font.size": 13, "axes.titlesize": 13, "image.interpolation": "nearest"})


def grid(
    rows: Iterable[Iterable[Image.Image | Tensor]],
    columns: Iterable[object] = (),
    labels: Iterable[object] = (),
    size: float = 2.4,
    **imshow: object,
) -> None:
    """Show rows of pictures, or of maps (h, w), with a title over each column and a label before each row."""
    rows, columns, labels = [list(row) for row in rows], list(columns), list(labels)
    shape = len(rows), len(rows[0])
    figsize = size * shape[1], size * 1.12 * shape[0]
    fig, axes = plt.subplots(*shape, figsize=figsize, squeeze=False, layout="constrained")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            axes[i, j].imshow(image.cpu() if isinstance(image, Tensor) else image, **imshow)
            axes[i, j].set(xticks=[], yticks=[])
            if i == 0 and columns:
                axes[i, j].set_title("\n".join(textwrap.fill(line, 22) for line in str(columns[j]).split("\n")))
        if labels:
            axes[i, 0].set_ylabel(labels[i])
    plt.show()


def seen(editor: Editor, x: Tensor, sigma: float = 0.0) -> Image.Image:
    """A scaled latent (1, 4, h, w) under noise of level sigma as a picture, brought to unit variance first."""
    return images.from_latent(editor, x / (sigma**2 + 1) ** 0.5)


def marked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture, a small one enlarged, with its mask outlined."""
    if picture.width <= 64:
        picture = picture.resize((256, 256), Image.Resampling.NEAREST)
    return outlined(picture, mask)


def moved(before: Image.Image, after: Image.Image, mask: Image.Image | None = None) -> float:
    """How far pixels moved outside the mask, RMS in grey levels."""
    apart = np.square(np.asarray(after, float) - np.asarray(before, float))
    return float(np.sqrt(np.mean(apart if mask is None else apart[np.asarray(mask) == 0])))


def rms(z: Tensor) -> float:
    return z.square().mean().sqrt().item()


def quote(thing: object, *parts: str) -> None:
    """Print the package's own source of a function or class as it is today, or its lines with these parts alone."""
    lines = textwrap.dedent(inspect.getsource(thing)).splitlines()
    if parts:
        lines = textwrap.dedent("\n".join(line for line in lines if any(part in line for part in parts))).splitlines()
    print("\n".join(lines))
