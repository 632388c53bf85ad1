"""A class that EdiVal-Agent's generating script loads, to run the method where its benchmark is run.

python generate.py --editor-class emilie_min.bench.edival:Emilie          each turn from the picture before
"""

from pathlib import Path

from PIL import Image


class Emilie:
    """One instruction on one picture at a time, from the released weights: EdiVal hands pictures on, and no latents.

    So its chains are image iteration with EMILIE's sampling; `emilie bench import edival` and `emilie bench run
    --methods emilie` do them by latent. weights: a file; None = the released checkpoint, which `emilie download`
    puts into weights/.
    """

    def __init__(self, device: str = "cuda", weights: str | Path | None = None):
        from .. import loading
        from ..checkpoint.download import WEIGHTS

        self.editor = loading.load(weights or loading.shipped(WEIGHTS), device=device)

    def generate_single_edit(
        self, instruction: str, current_image: Image.Image, seed: int | None = None
    ) -> Image.Image:
        """The edited picture, of the size that the model works at. Raises EmilieError."""
        from ..canvas.canvas import open

        canvas = open(current_image, self.editor, seed=0 if seed is None else seed)
        return canvas.edit(instruction)
