"""The paper's Fig. 4 drawn anew: what one edit runs through, and the two ways on to the next edit."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import Tensor

GREEN, BLUE, RED = "#d9ead3", "#1f5fa8", "#c0392b"


def figure_4(before: Image.Image, after: Image.Image, z_img: Tensor, z_T: Tensor, z_0: Tensor, text: str) -> None:
    """Show one edit e: pictures before and after, the latents of it, (1, 4, h, w), and its instruction."""
    fig, ax = plt.subplots(figsize=(13, 5.4), layout="constrained")
    ax.set(xlim=(0, 125), ylim=(0, 56), aspect="equal")
    ax.axis("off")
    ax.add_patch(FancyBboxPatch((46, 20), 31, 25, boxstyle="round,pad=1", facecolor=GREEN, edgecolor="0.5"))
    picture(ax, before, 2, 24, "$I^e$")
    box(ax, 17, 24, 10, 10, "$\\mathcal{E}$")
    picture(ax, z_img[0, 0], 31, 24, "$z_{img}^e$")
    picture(ax, z_T[0, 0], 31, 42, "$z_T \\sim \\mathcal{N}(0, I)$")
    box(ax, 48, 23, 6, 12, "8\nch.")
    box(ax, 59, 23, 16, 12, "$\\epsilon_\\theta(z_t, t, y^e)$")
    picture(ax, z_0[0, 0], 83, 24, "$z_{img}^{e+1}$")
    box(ax, 97, 24, 10, 10, "$\\mathcal{D}$")
    picture(ax, after, 112, 24, "$I^{e+1}$")
    for row in ((12, 17), (27, 31), (41, 48), (54, 59), (78, 83), (93, 97), (107, 112)):
        arrow(ax, (row[0], 29), (row[1], 29))
    arrow(ax, (41, 45), (48, 35))
    arrow(ax, (70, 35), (70, 39), (52, 39), (52, 35))
    ax.text(61, 42, "T times: $z_t \\rightarrow z_{t-1}$", ha="center", va="center")
    arrow(ax, (67, 17), (67, 23))
    ax.text(67, 15, f'$y^e$: "{text}"', ha="center", va="center")
    arrow(ax, (88, 23.5), (88, 10), (36, 10), (36, 23.5), colour=BLUE)
    ax.text(62, 7.5, "latent iteration: $f z_{img}^{e+1}$ is the next $z_{img}$", ha="center", va="center", color=BLUE)
    arrow(ax, (117, 23.5), (117, 3.5), (7, 3.5), (7, 23.5), colour=RED)
    ax.text(
        62, 1, "image iteration: through pixels, $\\mathcal{D}$ and $\\mathcal{E}$", ha="center", va="center", color=RED
    )
    plt.show()


def picture(ax: Axes, image: Image.Image | Tensor, x: float, y: float, title: str) -> None:
    ax.imshow(image, extent=(x, x + 10, y, y + 10), cmap="gray", zorder=2)
    ax.set(xlim=(0, 125), ylim=(0, 56))  # which imshow changes
    ax.text(x + 5, y + 11.8, title, ha="center", va="center")


def box(ax: Axes, x: float, y: float, width: float, height: float, label: str) -> None:
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0", facecolor="white", edgecolor="0.3"))
    ax.text(x + width / 2, y + height / 2, label, ha="center", va="center")


def arrow(ax: Axes, *corners: tuple[float, float], colour: str = "0.2") -> None:
    ax.plot(*zip(*corners[:-1]), color=colour, lw=1.6)
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", corners[-1], corners[-2], arrowprops=style)
