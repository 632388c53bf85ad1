"""One schema for every model: the layout of the original's `generate.yaml`, typed, so that an unknown key fails.

Fields marked (unused) stand in the original's files and say something about its training or its class loader; they
are read and checked, and nothing here depends on them.
"""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING, OmegaConf

from .errors import ConfigError

BUILT_IN = ("ip2p", "sd15", "toy", "toy-t2i")
TOKENIZER_FILES = ("vocab.json", "merges.txt")  # CLIP's
GATES = ("anchor", "eq8", "guidance")  # what a mask does: see `Editor.sample`
RESCALES = ("paper", "signed", "exact", "none")  # how f is found: see `Canvas.image_latent`
ITERATES = ("latent", "image")  # what the next edit starts from
SAMPLERS = ("euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")  # see `sampling.SAMPLERS`


@dataclass
class UNetConfig:
    in_channels: int = MISSING  # 8: z_t and z_img (InstructPix2Pix); 4: z_t alone (Stable Diffusion)
    out_channels: int = 4
    model_channels: int = MISSING
    attention_resolutions: list[int] = MISSING  # halvings of the latent, as factors, at which to attend
    num_res_blocks: int = MISSING
    channel_mult: list[int] = MISSING
    num_heads: int = MISSING
    context_dim: int = MISSING
    num_groups: int = 32  # ours: of every GroupNorm; narrow models need fewer than the original's 32
    transformer_depth: int = 1
    use_spatial_transformer: bool = True
    legacy: bool = False
    image_size: int = 32  # (unused)
    use_checkpoint: bool = False  # (unused)


@dataclass
class DDConfig:
    ch: int = MISSING
    ch_mult: list[int] = MISSING
    num_res_blocks: int = MISSING
    z_channels: int = 4
    in_channels: int = 3
    out_ch: int = 3
    num_groups: int = 32  # ours, as above
    double_z: bool = True
    attn_resolutions: list[int] = field(default_factory=list)
    dropout: float = 0.0
    resolution: int = 256  # (unused)


@dataclass
class AutoencoderConfig:
    ddconfig: DDConfig = field(default_factory=DDConfig)
    embed_dim: int = 4
    monitor: Optional[str] = None  # (unused)
    lossconfig: Any = None  # (unused)
    ckpt_path: Any = None  # (unused)


@dataclass
class TextConfig:
    """Sizes of CLIP's text model, by transformers' names; the defaults are ViT-L/14's (Radford et al. 2021)."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407


@dataclass
class TextParams:
    text_config: TextConfig = field(default_factory=TextConfig)
    words: Optional[list[str]] = None  # ours: all that a small model understands; None: CLIP's tokenizer
    version: str = "openai/clip-vit-large-patch14"  # the hub model whose tokenizer is meant


@dataclass
class UNetSection:
    params: UNetConfig = field(default_factory=UNetConfig)
    target: Optional[str] = None  # (unused)


@dataclass
class AutoencoderSection:
    params: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    target: Optional[str] = None  # (unused)


@dataclass
class TextSection:
    params: TextParams = field(default_factory=TextParams)
    target: Optional[str] = None  # (unused)


@dataclass
class ModelParams:
    unet_config: UNetSection = field(default_factory=UNetSection)
    first_stage_config: AutoencoderSection = field(default_factory=AutoencoderSection)
    cond_stage_config: TextSection = field(default_factory=TextSection)
    linear_start: float = 0.00085
    linear_end: float = 0.012
    timesteps: int = 1000
    scale_factor: float = 0.18215
    channels: int = 4
    conditioning_key: Optional[str] = None  # (unused, as all below)
    num_timesteps_cond: Optional[int] = None
    log_every_t: Optional[int] = None
    first_stage_key: Optional[str] = None
    cond_stage_key: Optional[str] = None
    cond_stage_trainable: Optional[bool] = None
    image_size: Optional[int] = None
    monitor: Optional[str] = None
    use_ema: Optional[bool] = None
    load_ema: Optional[bool] = None
    ckpt_path: Any = None
    scheduler_config: Any = None


@dataclass
class ModelSection:
    params: ModelParams = field(default_factory=ModelParams)
    target: Optional[str] = None  # (unused)
    base_learning_rate: Optional[float] = None  # (unused)


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
    model: ModelSection = field(default_factory=ModelSection)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: Any = None  # (unused) the original's training set
    lightning: Any = None  # (unused)


def load_config(name: str | Path) -> Config:
    """A config by name (one of `BUILT_IN`) or from a YAML file in the original's layout.

    Raises ConfigError for a file that cannot be read, a key that the schema does not know, a value of the wrong
    type, and settings that no network here can have.
    """
    path = files("emilie_min") / "configs" / f"{name}.yaml" if name in BUILT_IN else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {name}: {error}. Give one of {', '.join(BUILT_IN)} or a YAML file") from error
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    except Exception as error:  # OmegaConf's own errors, those of the YAML reader below it, and of merging odd YAML
        key = getattr(error, "full_key", None)
        reason = (str(error).splitlines() or ["not a mapping of settings"])[0]
        raise ConfigError(f"config {name}: {f'{key}: ' if key else ''}{reason}") from error
    _check(config, str(name))
    return config


def _check(config: Config, name: str) -> None:
    params = config.model.params
    unet, dd = params.unet_config.params, params.first_stage_config.params.ddconfig
    text = params.cond_stage_config.params.text_config
    ae, sampling = params.first_stage_config.params, config.sampling
    counts = {
        "unet_config": [unet.model_channels, unet.num_res_blocks, unet.num_heads, unet.num_groups, *unet.channel_mult],
        "ddconfig": [dd.ch, dd.num_res_blocks, dd.num_groups, dd.in_channels, dd.out_ch, *dd.ch_mult],
        "text_config": [text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.vocab_size],
        "sampling": [sampling.resolution, sampling.multiple, sampling.steps],
    }
    for section, values in counts.items():
        if min(values) < 1:
            raise ConfigError(f"config {name}: {section}: every size and count must be at least 1")
    if not unet.channel_mult or not dd.ch_mult:
        raise ConfigError(f"config {name}: channel_mult and ch_mult must name at least one level")
    halvings = len(unet.channel_mult) + len(dd.ch_mult) - 2
    wrong = [
        (unet.transformer_depth != 1, "unet_config: transformer_depth must be 1"),
        (not unet.use_spatial_transformer, "unet_config: use_spatial_transformer must be true"),
        (unet.legacy, "unet_config: legacy must be false"),
        (bool(dd.attn_resolutions), "first_stage_config: attn_resolutions must be empty"),
        (not dd.double_z, "first_stage_config: double_z must be true"),
        (dd.dropout != 0, "first_stage_config: dropout must be 0"),
        (unet.in_channels not in (4, 8), f"unet_config: in_channels must be 8 or 4, not {unet.in_channels}"),
        (unet.context_dim != text.hidden_size, "unet_config: context_dim must equal text_config's hidden_size"),
        (unet.model_channels % unet.num_groups != 0, "unet_config: model_channels must be a multiple of num_groups"),
        (dd.ch % dd.num_groups != 0, "ddconfig: ch must be a multiple of num_groups"),
        (
            any(m * unet.model_channels % unet.num_heads for m in unet.channel_mult),
            "unet_config: every width must be a multiple of num_heads",
        ),
        (
            len({ae.embed_dim, dd.z_channels, params.channels, unet.out_channels}) > 1,
            "channels, embed_dim, z_channels and out_channels must be the same number",
        ),
        (dd.in_channels != 3 or dd.out_ch != 3, "ddconfig: in_channels and out_ch must be 3"),
        (text.hidden_size % text.num_attention_heads != 0, "text_config: hidden_size must be a multiple of its heads"),
        (text.hidden_act not in ("quick_gelu", "gelu"), "text_config: hidden_act must be quick_gelu or gelu"),
        (text.max_position_embeddings != 77, "text_config: max_position_embeddings must be 77"),
        (params.timesteps < 2, "timesteps must be at least 2"),
        (not 0 < params.linear_start < params.linear_end < 1, "0 < linear_start < linear_end < 1 must hold"),
        (not params.scale_factor > 0, "scale_factor must be positive"),
        (
            sampling.multiple % 2**halvings != 0,
            f"sampling: multiple must be a multiple of {2**halvings}, since the networks halve a side {halvings} times",
        ),
    ]
    for bad, message in wrong:
        if bad:
            raise ConfigError(f"config {name}: {message}")
