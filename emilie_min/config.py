"""A model's settings, read from the layout of the original's `generate.yaml` and held flat: five sections of fields.

A key that the schema does not know fails, and so does a value that the networks here would not honour.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import MISSING, OmegaConf

from .errors import ConfigError, first_line, plain_file, printable

BUILT_IN = ("ip2p", "sd15", "toy", "toy-t2i")
GATES = ("anchor", "eq8", "guidance")  # what a mask does: see `Editor.steps`
TOKENIZER_FILES = ("vocab.json", "merges.txt")  # CLIP's


@dataclass
class UNetConfig:
    in_channels: int = MISSING  # 8: z_t and z_img (InstructPix2Pix); 4: z_t alone (Stable Diffusion)
    out_channels: int = 4
    model_channels: int = MISSING
    attention_resolutions: list[int] = MISSING  # the factors by which the latent is downsampled where to attend
    num_res_blocks: int = MISSING
    channel_mult: list[int] = MISSING
    num_heads: int = MISSING
    context_dim: int = MISSING
    num_groups: int = 32  # ours: of every GroupNorm; narrow models need fewer than the original's 32


@dataclass
class VAEConfig:
    ch: int = MISSING
    ch_mult: list[int] = MISSING
    num_res_blocks: int = MISSING
    z_channels: int = 4
    embed_dim: int = 4
    num_groups: int = 32  # ours, as above


@dataclass
class TextConfig:
    """CLIP's text model by transformers' names, the defaults those of ViT-L/14 (Radford et al. 2021); its tokens."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 49408
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407
    words: Optional[list[str]] = None  # ours: all that a small model understands; None: CLIP's tokenizer
    version: str = "openai/clip-vit-large-patch14"  # the hub model whose tokenizer is meant


@dataclass
class DiffusionConfig:
    linear_start: float = 0.00085
    linear_end: float = 0.012
    timesteps: int = 1000
    scale_factor: float = 0.18215  # brings the autoencoder's latents to unit variance
    channels: int = 4


@dataclass
class SamplingConfig:
    """Ours: what an edit uses when the user says nothing. The defaults are InstructPix2Pix's."""

    resolution: int = 512
    multiple: int = 64  # sides of the working picture are multiples of this
    steps: int = 100
    text_scale: float = 7.5
    image_scale: float = 1.5


@dataclass
class Config:
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    name: str = ""  # as it was asked for: a built-in one or a path


UNET, VAE, TEXT = (f"model.params.{part}_config.params" for part in ("unet", "first_stage", "cond_stage"))
SECTIONS = {  # where in the file a section stands; `embed_dim`, `words` and `version` stand one level above the others
    "model.params": "diffusion", UNET: "unet", VAE: "vae", f"{VAE}.ddconfig": "vae",
    TEXT: "text", f"{TEXT}.text_config": "text", "sampling": "sampling",
}  # fmt: skip
IGNORED = {  # what the original's files say about its training and its class loader
    "data", "lightning", "model.target", "model.base_learning_rate",
    *(f"model.params.{part}_config.target" for part in ("unet", "first_stage", "cond_stage")),
    *(f"model.params.{key}" for key in (
        "conditioning_key", "num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "image_size",
        "cond_stage_trainable", "monitor", "use_ema", "load_ema", "ckpt_path", "scheduler_config")),
    f"{UNET}.image_size", f"{UNET}.use_checkpoint",
    f"{VAE}.monitor", f"{VAE}.lossconfig", f"{VAE}.ckpt_path", f"{VAE}.ddconfig.resolution",
}  # fmt: skip
ONLY = {  # what the networks here do not vary: another value would go unnoticed
    f"{UNET}.transformer_depth": 1, f"{UNET}.use_spatial_transformer": True, f"{UNET}.legacy": False,
    f"{VAE}.ddconfig.attn_resolutions": [], f"{VAE}.ddconfig.double_z": True, f"{VAE}.ddconfig.dropout": 0,
    f"{VAE}.ddconfig.in_channels": 3, f"{VAE}.ddconfig.out_ch": 3,
    f"{TEXT}.text_config.max_position_embeddings": 77,
}  # fmt: skip
LISTS = ("attention_resolutions", "channel_mult", "ch_mult", "words")
PLAIN = "are not read here, since they can multiply or reach this machine's environment: write the values out"
NESTED = re.compile(r"([-?:][ \t]+){20}")  # YAML's readers take the square of the depth
LONGEST = 2**16
HUGE = "longer than 64 KB, or nested beyond what a config is"
LARGEST = {"num_res_blocks": 16, "num_hidden_layers": 64}  # of all other sizes and counts 2**20


def load_config(name: str | Path) -> Config:
    """A config by name (one of `BUILT_IN`) or from a YAML file in the original's layout.

    Raises ConfigError for a file that cannot be read, a key that the schema does not know, a value of the wrong type,
    and settings that would be silently wrong; what no network can be built of fails in `checkpoint.networks.build`.
    """
    path = files("emilie_min") / "configs" / f"{name}.yaml" if name in BUILT_IN else Path(name)
    try:
        if isinstance(path, Path):
            plain_file(path, LONGEST)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        what = f"config {printable(name)}: {printable(why)}"
        raise ConfigError(f"{what}. Give one of {', '.join(BUILT_IN)} or a YAML file") from error
    config: Any = OmegaConf.structured(Config)
    key = ""
    try:
        _require(len(re.findall(r"[\[{]", text)) <= 1000 and not NESTED.search(text), HUGE)
        _require(not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)), f"aliases (*name) {PLAIN}")
        given: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        _require("${" not in str(given), f"interpolations (${{name}}) {PLAIN}")
        _require(isinstance(given, dict), "not a mapping of settings")
        for section, key, value in list(_settings(given)):
            config.merge_with({section: {key.rpartition(".")[2]: value}})
        key = ""
        config = OmegaConf.to_object(config)
        _check(config)
    except Exception as error:  # OmegaConf's own errors, those of the YAML reader below it, and of odd YAML
        key = key or getattr(error, "full_key", "")
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None) or first_line(error)
        key = key or (f"line {mark.line + 1}" if mark else "")
        raise ConfigError(printable(f"config {name}: {f'{key}: ' if key else ''}{reason}")) from error
    config.name = str(name)
    return config


def _settings(given: dict[str, Any], above: str = "") -> Iterator[tuple[str, str, object]]:
    """(section, the key's full path in the file, value) of all that is neither ignored nor fixed."""
    for key, value in given.items():
        path = f"{above}.{key}".lstrip(".")
        if any(f"{section}.".startswith(f"{path}.") for section in SECTIONS):
            _require(isinstance(value, dict), f"{path} must be a mapping of settings")
            yield from _settings(value, path)
        elif path in ONLY:
            _require(value == ONLY[path], f"{path} must be {str(ONLY[path]).lower()}, not {value}")
        elif path not in IGNORED:
            _require(above in SECTIONS, f"{path} is not a key that is known here")
            _require(
                key not in LISTS or isinstance(value, list) or value is None, f"{path} must be a list, as in [1, 2]"
            )
            kinds = {*map(type, value)} if isinstance(value, list) else set()  # OmegaConf would let others pass
            _require(kinds <= {int, str}, f"{path} lists whole numbers, or words, with quotes round on, off, yes, no")
            yield SECTIONS[above], path, value


def _check(config: Config) -> None:
    """Raises ValueError for sizes out of range and for settings that contradict each other."""
    unet, vae, text, diffusion = config.unet, config.vae, config.text, config.diffusion
    for section in dict.fromkeys(SECTIONS.values()):
        for key, value in vars(getattr(config, section)).items():
            least, most = int(not key.endswith("_token_id")), LARGEST.get(key, 2**20)
            for n in value if isinstance(value, list) else [value]:
                wrong = isinstance(n, int) and not least <= n <= most
                _require(not wrong, f"{section}: {key} must be from {least} to {most}, not {n}")
    for levels in (unet.channel_mult, vae.ch_mult):
        _require(1 <= len(levels) <= 8, "channel_mult and ch_mult must have 1 to 8 levels")
    channels = {diffusion.channels, vae.embed_dim, vae.z_channels, unet.out_channels}
    _require(len(channels) == 1, "channels, embed_dim, z_channels and out_channels must be the same number")
    _require(unet.in_channels in (4, 8), f"unet: in_channels must be 8 or 4, not {unet.in_channels}")
    _require(unet.context_dim == text.hidden_size, "unet: context_dim must equal text_config's hidden_size")
    _require(unet.model_channels % 2 == 0, "unet: model_channels must be even")
    for width in (mult * unet.model_channels for mult in unet.channel_mult):
        _require(width % unet.num_heads == 0, "unet: every width must be a multiple of num_heads")
    _require(text.hidden_act in ("quick_gelu", "gelu"), "text: hidden_act must be quick_gelu or gelu")
    tokens = max(text.bos_token_id, text.eos_token_id, text.pad_token_id, len(text.words or ()) - 1)
    _require(tokens < text.vocab_size, f"text: vocab_size must exceed every token's number, {tokens} too")
    words = text.words or []
    twice = next((word for i, word in enumerate(words) if word in words[:i]), None)
    _require(twice is None, f"text: words has {twice!r} twice, and so no right numbers")
    _require(diffusion.timesteps >= 2, "timesteps must be at least 2")
    _require(0 < diffusion.linear_start < diffusion.linear_end < 1, "0 < linear_start < linear_end < 1 must hold")
    _require(0 < diffusion.scale_factor < float("inf"), "scale_factor must be positive and finite")
    factor = 2 ** (len(unet.channel_mult) + len(vae.ch_mult) - 2)
    downsampled = f"sampling: multiple must be a multiple of {factor}, since the networks downsample by that factor"
    _require(config.sampling.multiple % factor == 0, downsampled)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)
