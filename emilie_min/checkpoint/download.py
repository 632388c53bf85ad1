"""The released weights and CLIP's tokenizer, from the hub, once. Nothing here needs PyTorch."""

import hashlib
import os
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get
from tqdm import tqdm

from ..config import TOKENIZER_FILES
from ..errors import CheckpointError, EmilieError, TokenizerError, first_line
from . import writing

RELEASED = {  # by SHA-256
    "fbc31a67aab29ad38eef622a252d3fa4b0a81d4a4dc65da416cf45b13aa67688": "instruct-pix2pix-00-22000.safetensors",
    "ffd280ddcfc8234e4d28b93641cb83169cebcb4d70998df9ee2eabb4d705374a": "instruct-pix2pix-00-22000.ckpt",
}
REPOSITORY, WEIGHTS = "timbrooks/instruct-pix2pix", "instruct-pix2pix-00-22000.safetensors"
CLIP = "openai/clip-vit-large-patch14"
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")  # taken where the repository has them
WAYS = (  # to the hub, for the end of a message
    "is this machine online? Behind a proxy set HTTPS_PROXY=http://HOST:PORT, for a mirror HF_ENDPOINT=https://HOST, "
    "and HF_HUB_OFFLINE must not be 1"
)


def hash_file(path: str | Path) -> str:
    """The file's SHA-256 in hex, with a progress bar on a terminal. Raises CheckpointError if it cannot be read."""
    digest, path = hashlib.sha256(), Path(path)
    look = {"desc": f"sha256 of {path.name}", "leave": False, "disable": None}
    try:
        with open(path, "rb") as f, tqdm.wrapattr(f, "read", path.stat().st_size, **look) as watched:
            while chunk := watched.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def download(
    folder: str | Path = "weights",
    tokenizer_only: bool = False,
    endpoint: str | None = None,
    revision: str = "main",
    expected_sha256: str | None = None,
) -> str:
    """Fetch the released weights into `folder` and CLIP's tokenizer into `folder`/tokenizer; returns lines to print.

    What is there already stays; what was interrupted goes on where it stopped. The weights appear under their name
    once their SHA-256 is right; a file of that name with another one is moved aside. endpoint: a mirror of the hub,
    default HF_ENDPOINT or huggingface.co. Raises CheckpointError, TokenizerError.
    """
    folder, lines = Path(folder), []
    expected = expected_sha256 or next(digest for digest, name in RELEASED.items() if name == WEIGHTS)
    tokenizer = folder / "tokenizer"
    if all((tokenizer / name).is_file() for name in TOKENIZER_FILES):
        lines.append(f"{tokenizer}: already there")
    else:
        for name in TOKENIZER_FILES + TOKENIZER_EXTRAS:
            partial = _fetch(CLIP, name, tokenizer / name, "main", endpoint, TokenizerError)
            if partial is None and name in TOKENIZER_FILES:
                raise TokenizerError(f"{CLIP} has no {name} at {endpoint or 'the hub'}: try again without the mirror")
            if partial:
                os.replace(partial, tokenizer / name)
                lines.append(f"{tokenizer / name}: {tqdm.format_sizeof((tokenizer / name).stat().st_size, 'B')}")
    if tokenizer_only:
        return "\n".join(lines)

    target = folder / WEIGHTS
    if target.exists():
        if hash_file(target) == expected:
            return "\n".join([*lines, f"{target}: already there, sha256 as released"])
        aside = target.with_name(target.name + ".wrong")
        os.replace(target, aside)
        lines.append(f"{target} was not the released file: moved to {aside}, which you may delete")
    partial = _fetch(REPOSITORY, WEIGHTS, target, revision, endpoint, CheckpointError, resume=True)
    if partial is None:
        raise CheckpointError(f"{REPOSITORY} has no {WEIGHTS} at revision {revision}: check it, and the mirror if any")
    found = hash_file(partial)
    if found != expected:
        partial.unlink()
        raise CheckpointError(
            f"{WEIGHTS} came with sha256 {found} and not {expected}: it was deleted. Try again, or without the mirror"
        )
    os.replace(partial, target)
    return "\n".join([*lines, f"{target}: {tqdm.format_sizeof(target.stat().st_size, 'B')}, sha256 as released"])


def _fetch(
    repository: str,
    name: str,
    target: Path,
    revision: str,
    endpoint: str | None,
    complaint: type[EmilieError],
    resume: bool = False,
) -> Path | None:
    """A file of a hub repository, whole, beside its target; None if there is none. `resume`: after what is there.

    `hf_hub_download` starts anew after an interruption, so this uses the two functions below it: one for the size and
    place of a file, one that reads from a given byte on and tries again by itself when a connection breaks.
    """
    url = hf_hub_url(repository, name, revision=revision, endpoint=endpoint)
    partial = target.with_name(f".{name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remote = get_hf_file_metadata(url, token=False)  # public files: no one's token leaves for a mirror
        with open(partial, "ab" if resume else "wb") as f:
            if remote.size is not None:
                if f.tell() > remote.size:
                    f.truncate(0)
                    f.seek(0)
                writing.need_space(target.parent, remote.size - f.tell())
            http_get(remote.location, f, resume_size=f.tell(), expected_size=remote.size, displayed_filename=name)
            f.flush()
            os.fsync(f.fileno())
        return partial
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 404):  # 401 is the hub's answer for a repository that is not there
            return None
        raise complaint(f"{url}: the server answered {status}. Run the same command again later") from error
    except (HTTPError, OSError, UnicodeError) as error:  # the last is that of a host that no network can have
        if isinstance(error, HTTPError | ConnectionError | TimeoutError | UnicodeError) or error.errno is None:
            kept = partial.stat().st_size if resume and partial.exists() else 0
            again = f"run the same command again, {tqdm.format_sizeof(kept, 'B')} are kept"
            raise complaint(f"{url} cannot be fetched ({first_line(error)}): {again if kept else WAYS}") from error
        raise complaint(f"{target} cannot be written: {writing.explain(error)}") from error
