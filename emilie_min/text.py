"""CLIP's text model (Radford et al. 2021), from transformers, behind the original checkpoint's keys."""

from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .config import TextConfig
from .errors import InstructionError, TokenizerError

TOKENIZER_FILES = ("vocab.json", "merges.txt")  # CLIP's
LENGTH = 77  # tokens, the first and the last of which mark the ends


class TextEncoder(nn.Module):
    """Token ids to the context that the UNet attends to: the last hidden state, after the final layer norm."""

    def __init__(self, config: TextConfig, tokenizer_folders: tuple[str | Path, ...] = ()):
        super().__init__()
        self.config, self.tokenizer_folders = config, tokenizer_folders
        sizes = {key: value for key, value in vars(config).items() if key not in ("words", "version")}
        self.transformer = CLIPTextModel(CLIPTextConfig(**sizes, attn_implementation="sdpa"))

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: (B, 77) integers -> (B, 77, D)."""
        return self.transformer(input_ids=token_ids).last_hidden_state

    def tokenize(self, texts: list[str], truncate: bool = False) -> Tensor:
        """Instructions to (B, 77) token ids: a start token, the words, end tokens to the end.

        Raises InstructionError for a text of more than 75 tokens (unless `truncate`) and for words that a small
        model does not know, TokenizerError where CLIP's tokenizer files are needed and not found.
        """
        rows = torch.full((len(texts), LENGTH), self.config.pad_token_id)
        for row, text in zip(rows, texts):
            ids = self._words(text) if self.config.words else self._clip.encode(text, add_special_tokens=False)
            if len(ids) > LENGTH - 2 and not truncate:
                kept, cut = (self._text(part) for part in (ids[: LENGTH - 2], ids[LENGTH - 2 :]))
                raise InstructionError(
                    f"the instruction has {len(ids)} tokens and the model reads {LENGTH - 2}: shorten it. "
                    f'After "...{kept[-40:]}" this would be cut: "{cut}"'
                )
            if max(ids, default=0) >= self.config.vocab_size:
                raise TokenizerError(
                    f"the tokenizer has more tokens than this text model's {self.config.vocab_size}: another model's"
                )
            ids = [self.config.bos_token_id, *ids[: LENGTH - 2], self.config.eos_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _words(self, text: str) -> list[int]:
        words = text.lower().replace(",", " ").replace(".", " ").split()
        unknown = [word for word in words if word not in self.config.words]
        if unknown:
            raise InstructionError(
                f"the small model does not know {', '.join(map(repr, unknown))}; "
                f"its words are: {' '.join(self.config.words)}"
            )
        return [self.config.words.index(word) for word in words]

    def _text(self, ids: list[int]) -> str:
        return " ".join(self.config.words[i] for i in ids) if self.config.words else self._clip.decode(ids)

    @cached_property
    def _clip(self) -> CLIPTokenizer:
        """CLIP's tokenizer: from the named folders, else from the hub's cache; never from the network."""
        folders = [Path(folder) for folder in self.tokenizer_folders]
        cached = try_to_load_from_cache(self.config.version, "vocab.json")  # a path, or something else that is none
        for folder in folders + ([Path(cached).parent] if isinstance(cached, str) else []):
            if all((folder / name).is_file() for name in TOKENIZER_FILES):
                try:
                    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
                except Exception as error:  # tokenizers raises bare Exceptions
                    raise TokenizerError(f"the tokenizer files in {folder} cannot be read: {error}") from error
        raise TokenizerError(
            f"no tokenizer: vocab.json and merges.txt of {self.config.version} are neither in "
            f"{' nor '.join(map(str, folders)) or 'a named folder'} nor in the hub's cache. "
            "Run `emilie download --tokenizer` once, or copy the two files into weights/tokenizer/"
        )
