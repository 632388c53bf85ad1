"""What a step has denoised, to look at, without the decoder: a linear map from a latent's cells to colours.

As other tools do it, but fitted by least squares to the pictures and latents of the canvas at hand, so that it holds
for every model; a cell becomes a pixel. For looking only.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .canvas import Canvas

MOST = 4  # states that are fitted to


def fit(canvas: Canvas) -> Tensor:
    """(5, 3): a cell's four channels and a 1 to red, green, blue in [0, 255]; of the first and the latest pictures."""
    states = [canvas.states[0], *canvas.history[1 - MOST :]]
    rows = torch.cat([with_one(state.latent) for state in states])
    colours = [np.asarray(s.image.resize(s.latent.shape[:1:-1], Image.Resampling.BOX), np.float32) for s in states]
    wanted = torch.from_numpy(np.concatenate([colour.reshape(-1, 3) for colour in colours]))
    ridge = 1e-3 * len(rows) * torch.eye(5)  # where a flat picture leaves the map open
    return torch.linalg.solve(rows.T @ rows + ridge, rows.T @ wanted)


def look(latent: Tensor, by: Tensor) -> Image.Image:
    """A scaled latent (1, 4, h, w) on any device as a picture of a pixel a cell, (w, h)."""
    pixels = (with_one(latent.float().cpu()) @ by).clamp(0, 255).round().byte()
    return Image.fromarray(pixels.view(*latent.shape[2:], 3).numpy())


def with_one(latent: Tensor) -> Tensor:  # (1, 4, h, w) -> (h w, 5)
    cells = latent[0].flatten(1).T
    return torch.cat([cells, torch.ones(len(cells), 1)], dim=1)
