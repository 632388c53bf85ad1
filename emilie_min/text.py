"""CLIP's text model (Radford et al. 2021), from transformers, behind the original checkpoint's keys."""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .config import TextConfig

LENGTH = 77  # tokens, the first and the last of which mark the ends


class TextEncoder(nn.Module):
    """Token ids to the context that the UNet attends to: the last hidden state, after the final layer norm."""

    def __init__(self, config: TextConfig, tokenizer: Callable[[list[str], bool], Tensor]):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        sizes = {key: value for key, value in vars(config).items() if key not in ("words", "version")}
        self.transformer = CLIPTextModel(CLIPTextConfig(**sizes, attn_implementation="sdpa"))  # type: ignore[call-arg]

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: (B, 77) integers -> (B, 77, D)."""
        return self.transformer(input_ids=token_ids).last_hidden_state

    def tokenize(self, texts: list[str], truncate: bool = False) -> Tensor:
        """Instructions to (B, 77) token ids; see `checkpoint.tokenizer`. Raises InstructionError, TokenizerError."""
        return self.tokenizer(texts, truncate)
