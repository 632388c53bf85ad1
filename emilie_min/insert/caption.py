"""BLIP-2 (Li et al., ICML 2023) says in a few words what a picture shows; by transformers, from files that are here."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..checkpoint.networks import not_finite
from ..checkpoint.schema import parse
from ..errors import CheckpointError, EmilieError, explain_oom, first_line, hushed, printable
from ..loading import pick_device

if TYPE_CHECKING:
    from transformers import Blip2Config

RELEASED = "Salesforce/blip2-opt-2.7b"  # the smallest released one, 15 GB in float32; the paper does not say which
LONGEST = 48  # tokens
LAYERS = 1000  # of a part, at most: the released ones have up to 39
ROOM = 4 * 2**30  # bytes free on a card, below which the captioner leaves it to the editor
PARTS = {  # what a folder must hold, and names of files that do
    "config.json": ("config.json",),
    "the weights": tuple(f"{n}{i}" for n in ("model.safetensors", "pytorch_model.bin") for i in ("", ".index.json")),
    "the image processor": ("preprocessor_config.json", "processor_config.json"),
    "the tokenizer": ("tokenizer.json", "vocab.json", "spiece.model"),
}  # fmt: skip


class Captioner:
    """A BLIP-2 and its processor.

    model: a folder in the hub's format, or a name in the hub's cache; nothing is downloaded. device: None = CUDA if
    there is one, in float16, else the CPU in float32. Raises CheckpointError.
    """

    def __init__(self, model: str | Path = RELEASED, device: str | torch.device | None = None):
        import transformers
        from transformers.utils import logging

        self.device, folder = pick_device(device), find(model)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        verbosity = logging.get_verbosity()
        try:
            logging.set_verbosity_error()  # its page on missing tensors becomes one line below
            logging.disable_progress_bar()
            with hushed(descriptor=1):  # tokenizers quotes its files there
                self.processor = transformers.Blip2Processor.from_pretrained(folder, local_files_only=True)
            weigh(transformers.Blip2Config.from_pretrained(folder, local_files_only=True), folder)
            with explain_oom(f"while {printable(model)} was loaded"):
                self.model, report = transformers.Blip2ForConditionalGeneration.from_pretrained(
                    folder, local_files_only=True, dtype=dtype, output_loading_info=True
                )
        except CheckpointError:
            raise
        except Exception as error:  # of whatever type its files provoke
            raise CheckpointError(
                f"{printable(model)} cannot be loaded as BLIP-2: {printable(first_line(error), 200)}"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()
        if lacking := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
            raise CheckpointError(
                f"{printable(model)} lacks {len(lacking)} tensors of a BLIP-2, such as {lacking[0]}: copy all its files"
            )
        if name := not_finite(self.model):
            raise CheckpointError(f"{printable(model)} is damaged: {name} is not finite. Copy all its files anew")
        self.model.eval()

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> str:
        """A caption of a PIL RGB picture: greedy, one line. Raises EmilieError."""
        needed = sum(p.nbytes for p in self.model.parameters()) + 2**30
        device = self.device if self.model.device == self.device or self.free() >= needed else torch.device("cpu")
        try:
            with explain_oom("while the inset was captioned: give --caption"):
                self.model.to(device)
                inputs = self.processor(images=image, return_tensors="pt").to(device, self.model.dtype)
                ids = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=LONGEST)
            said = self.processor.batch_decode(ids, skip_special_tokens=True)[0]
        except EmilieError:
            raise
        except Exception as error:  # of whatever type settings that do not fit each other provoke
            wrong = f"this BLIP-2 fails, as with files that do not belong together: {printable(first_line(error), 200)}"
            raise CheckpointError(f"{wrong}. Copy all its files anew, or give --caption") from error
        if self.free() < ROOM:
            self.leave()
        return " ".join(said.split())

    def free(self) -> float:
        """Bytes that are free on the device; infinite on a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else float("inf")

    def leave(self) -> None:
        """Leave the card to the editor, until the next caption."""
        self.model.to("cpu")
        torch.cuda.empty_cache()


def find(model: str | Path) -> Path:
    """The folder of a model that is here, once it is whole and a BLIP-2. Raises CheckpointError."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(model), local_files_only=True))
        except Exception as error:  # what is no name of a repository is an error of its own
            raise CheckpointError(
                f"{printable(model)} is neither a folder nor in the hub's cache: `hf download {RELEASED}` fetches the "
                "released one, 15 GB; or give --caption"
            ) from error
    lacking = [part for part, files in PARTS.items() if not any((folder / n).is_file() for n in files)]
    if lacking:
        raise CheckpointError(
            f"{printable(folder)} is no whole BLIP-2, it lacks {', '.join(lacking)}: copy all its files"
        )
    try:
        kind = parse((folder / "config.json").read_text(encoding="utf-8"), infinite=True).get("model_type")
    except (ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"{printable(folder)}/config.json cannot be read: {first_line(error)}") from error
    if kind != "blip-2":
        raise CheckpointError(f"{printable(folder)} is not BLIP-2: its config.json says {printable(kind, 60)}")
    return folder


def weigh(config: "Blip2Config", folder: Path) -> None:
    """Of a model that is larger than its weight files all would be allocated. Raises CheckpointError."""
    from transformers import Blip2ForConditionalGeneration

    spoken = f"{printable(folder)}/config.json speaks of"
    for part in (config.vision_config, config.qformer_config, config.text_config):
        if getattr(part, "num_hidden_layers", 0) > LAYERS:
            raise CheckpointError(f"{spoken} more than {LAYERS} layers: copy all its files anew")
    with torch.device("meta"):
        wanted = 2 * sum(p.numel() for p in Blip2ForConditionalGeneration(config).parameters())
    held = sum(path.stat().st_size for end in ("safetensors", "bin") for path in folder.glob(f"*.{end}"))
    if wanted > held:
        raise CheckpointError(
            f"{spoken} a model of {wanted / 1e9:.2g} GB in float16, and its weight files have {held / 1e9:.2g} GB: "
            "copy all its files anew"
        )
