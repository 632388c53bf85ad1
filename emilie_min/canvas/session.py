"""A canvas as one .safetensors file: latents, noise, pictures, masks, and in its metadata instructions and settings."""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from ..checkpoint.writing import write_tensors
from ..emilie import Editor
from ..errors import CanvasError
from .state import State

FORMAT = "emilie canvas 1"


def is_session(path: str | Path) -> bool:
    """Whether a path is for `read`: by its name, or because a .safetensors file's table of contents begins it."""
    if Path(path).suffix == ".safetensors":
        return True
    try:
        with open(path, "rb") as f:
            return f.read(9)[8:] == b"{"
    except OSError:
        return False


def write(canvas, path: str | Path) -> None:
    """A `Canvas` to a file, whole or not at all. Raises CanvasError."""
    tensors = {"z_init": canvas.z_init, "z_img": canvas.z_img}
    for i, state in enumerate(canvas.states):
        tensors[f"{i}.latent"] = state.latent
        pictures = {"image": state.image, "mask": state.mask}
        pictures |= {f"mask.{k}": mask for k, (_, mask) in enumerate(state.regions)}
        tensors |= {f"{i}.{key}": torch.from_numpy(np.array(p)) for key, p in pictures.items() if p is not None}
    about = {
        "model": canvas.editor.model,
        "dtype": str(canvas.editor.dtype),
        "seed": canvas.seed,
        "original_size": canvas.original_size,
        "native": canvas.native,
        **({} if canvas.turned is None else {"turned": canvas.turned}),
        **({} if canvas.part is None else {"part": canvas.part}),
        "at": canvas.at,
        "undone": canvas.redo_stack,
        "states": [
            {"instruction": s.instruction, "parent": s.parent, "settings": s.settings, "f": s.f}
            | ({"regions": [text for text, _ in s.regions]} if s.regions else {})
            for s in canvas.states
        ],
    }
    try:
        write_tensors(tensors, path, {"format": FORMAT, "canvas": json.dumps(about)})
    except OSError as error:
        raise CanvasError(f"{path}: cannot write the canvas: {error.strerror or error}") from error


def read(path: str | Path, editor: Editor) -> dict:
    """What `write` wrote, as the fields of a `Canvas`. To go on gives what an uninterrupted session gives, to the bit.

    Warns where it was made with other weights or in another dtype. Raises CanvasError for another kind of file, and
    where the editor's latents have another shape.
    """
    if not Path(path).is_file():
        raise CanvasError(f"no canvas at {path}" + (", which is a folder" if Path(path).is_dir() else ""))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CanvasError(f"{path} is no canvas of this version: its format is {metadata.get('format')!r}")
            about = json.loads(metadata["canvas"])
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        pictures = {k: Image.fromarray(v.numpy()) for k, v in tensors.items() if ".image" in k or ".mask" in k}
        states = []
        for i, record in enumerate(about["states"]):
            latent, image, mask = tensors[f"{i}.latent"], pictures[f"{i}.image"], pictures.get(f"{i}.mask")
            texts = record.pop("regions", [])  # files from before there were several have none
            regions = [(text, pictures.get(f"{i}.mask.{k}")) for k, text in enumerate(texts)]
            states.append(State(latent=latent, image=image, mask=mask, regions=regions, **record))
        parents = [state.parent for state in states]
        if parents[0] is not None or any(not 0 <= parent < i for i, parent in enumerate(parents[1:], 1)):
            raise ValueError("its tree of edits is damaged")
        if any(not 0 <= i < len(states) for i in [about["at"], *about["undone"]]):
            raise ValueError("it names a state that it does not hold")
        fields = {
            "seed": about["seed"],
            "original_size": tuple(about["original_size"]),
            "native": about["native"],
            "turned": about.get("turned"),
            "part": None if about.get("part") is None else tuple(about["part"]),
            "z_init": tensors["z_init"],
            "z_img": tensors["z_img"],
            "states": states,
            "at": about["at"],
            "redo_stack": about["undone"],
        }
        made = about["model"], about["dtype"]
    except CanvasError:
        raise
    except Exception as error:  # whatever a broken or foreign file leads to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CanvasError(f"{path} cannot be read as a canvas: {reason}") from error
    width, height = states[0].image.size
    shape = (1, editor.config.diffusion.channels, height // editor.vae.factor, width // editor.vae.factor)
    latents = [fields["z_init"], fields["z_img"], *(state.latent for state in states)]
    if len({state.image.size for state in states}) > 1 or any(tuple(z.shape) != shape for z in latents):
        raise CanvasError(f"{path} was made with {made[0]}, whose latents {editor.model} cannot use")
    if made != (editor.model, str(editor.dtype)):
        warnings.warn(
            f"{path} was made with {made[0]} in {made[1]} and goes on with {editor.model} in {editor.dtype}",
            stacklevel=3,
        )
    return fields
