"""Instructions to token ids: by the words that a small model knows, or by CLIP's files, never from the network."""

from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import CLIPTokenizer

from ..config import TOKENIZER_FILES, TextConfig
from ..errors import InstructionError, TokenizerError, hushed, printable
from ..text import LENGTH
from .schema import parse

END = "<|endoftext|>"  # also what CLIP's vocabulary puts in the place of what it does not know


class Tokenizer:
    """A config's tokenizer; CLIP's is read when it is first needed: from `folders`, else from the hub's cache."""

    def __init__(self, config: TextConfig, folders: tuple[str | Path, ...] = ()):
        self.config, self.folders = config, [Path(folder) for folder in folders]

    def __call__(self, texts: list[str], truncate: bool = False) -> Tensor:
        """Instructions to (B, 77) token ids: a start token, the words, end tokens to the end.

        Raises InstructionError for a text of more than 75 tokens (unless `truncate`) and for words that a small
        model does not know, TokenizerError where CLIP's tokenizer files are needed and not found.
        """
        rows = torch.full((len(texts), LENGTH), self.config.pad_token_id)
        for row, text in zip(rows, texts):
            ids = self._words(text) if self.config.words else self._byte_pairs(text)
            if len(ids) > LENGTH - 2 and not truncate:
                kept, cut = (self._text(part) for part in (ids[: LENGTH - 2], ids[LENGTH - 2 :]))
                raise InstructionError(
                    f"the instruction has {len(ids)} tokens and the model reads {LENGTH - 2}: shorten it. "
                    f'After "...{printable(kept[-40:])}" this would be cut: "{printable(cut, 100)}"'
                )
            if max(ids, default=0) >= self.config.vocab_size:
                raise TokenizerError(
                    f"the tokenizer has more tokens than this text model's {self.config.vocab_size}: another model's"
                )
            ids = [self.config.bos_token_id, *ids[: LENGTH - 2], self.config.eos_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _words(self, text: str) -> list[int]:
        words = text.lower().translate(dict.fromkeys(map(ord, ",.!?;:"), " ")).split()
        known = self.config.words or []
        unknown = [word for word in words if word not in known]
        if unknown:
            raise InstructionError(
                f"the small model does not know {printable(', '.join(map(repr, unknown)), 100)}; "
                f"its words are: {printable(' '.join(known))}"
            )
        return [known.index(word) for word in words]

    def _byte_pairs(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InstructionError(
                f"the instruction holds half a character, {text[error.start]!r}: retype it"
            ) from error
        ids = self._clip.encode(text, add_special_tokens=False)
        if self._clip.unk_token_id in ids and END not in text:
            wrong = (
                f'the vocab.json that was found lacks tokens for "{printable(text, 60)}": it is damaged, or not CLIP\'s'
            )
            raise TokenizerError(f"{wrong}. `emilie download --tokenizer` fetches CLIP's")
        return ids

    def _text(self, ids: list[int]) -> str:
        return " ".join(self.config.words[i] for i in ids) if self.config.words else str(self._clip.decode(ids))

    @cached_property
    def _clip(self) -> CLIPTokenizer:
        try:
            cached = try_to_load_from_cache(self.config.version, "vocab.json")  # a path, or something else that is none
        except ValueError:  # no hub model can have such a name
            cached = None
        for folder in self.folders + ([Path(cached).parent] if isinstance(cached, str) else []):
            if all((folder / name).is_file() for name in TOKENIZER_FILES):
                try:
                    vocabulary = parse((folder / "vocab.json").read_text(encoding="utf-8"))
                    if END not in vocabulary:
                        raise ValueError(f"vocab.json has no {END}")
                    numbers = [*vocabulary.values()]  # of what is no number tokenizers would say nothing
                    if {*map(type, numbers)} != {int} or sorted(numbers) != [*range(len(numbers))]:
                        raise ValueError("vocab.json does not number its tokens from 0 on, each once")
                    with hushed(descriptor=1):  # tokenizers quotes its files there
                        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
                except Exception as error:  # tokenizers raises bare Exceptions
                    wrong = printable(f"the tokenizer files in {folder} cannot be read: {error}")
                    raise TokenizerError(f"{wrong}. `emilie download --tokenizer` fetches CLIP's") from error
        raise TokenizerError(
            f"no tokenizer: vocab.json and merges.txt of {printable(self.config.version)} are neither in "
            f"{' nor '.join(map(str, self.folders)) or 'a named folder'} nor in the hub's cache. "
            "Run `emilie download --tokenizer` once, or copy the two files into weights/tokenizer/"
        )
