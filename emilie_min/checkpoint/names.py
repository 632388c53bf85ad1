"""What tensors are called: other names for the same numbers, diffusers' folder, and files of other models.

Four tables that can be extended: VAE_ATTENTION and the UNET, VAE and RESNET rules lead from other tools' names to the
original's; DROPPED is what no sampling needs; TELL_TALES is what a file is that cannot be used, and the way out.
"""

import re
from collections.abc import Callable, Iterable, Mapping

RAW, EMA, VAE, TEXT = "model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model.transformer."

DROPPED = {  # what is in released files and not needed to sample: a name for it, and its keys
    "noise schedule (computed from the config)": "betas|logvar|scale_factor|alphas_cumprod(_prev)?"
    "|(sqrt|log)_(one_minus_)?alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod|posterior_[a-z0-9_]+",
    "counters of the weight average": r"model_ema\.(decay|num_updates)",
    "position numbers": r"cond_stage_model\.transformer\..*position_ids",
    "the autoencoder's training loss": r"first_stage_model\.loss\..*",
    "CLIP's other half": r"cond_stage_model\.(transformer\.)?(logit_scale|(text|visual)_projection.*|vision_model\..*)",
}

VAE_ATTENTION = {  # inside ...mid.attn_1., as converters from diffusers' layout write them, new and old
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "group_norm": "norm",
}
MATRICES = re.compile(  # 1x1 convolutions, which are also written as matrices
    r"first_stage_model\.((en|de)coder\..*(\.attn_1\.(q|k|v|proj_out)|nin_shortcut)|(post_)?quant_conv)\.weight"
    r"|model\.diffusion_model\..*\.(proj_in|proj_out|skip_connection)\.weight"
    r"|model_ema\.diffusion_model.*(proj_in|proj_out|skip_connection)weight"
)

# ---- diffusers' folder: its parts, where their tensors are, what a part's names become

FOLDER = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}


def from_diffusers(part: str, keys: Iterable[str]) -> dict[str, str]:
    """Of one part of diffusers' folder, each tensor's name there -> its key in the original's layout."""
    keys = list(keys)
    if part == "text_encoder":
        return {key: TEXT + "text_model." + key.removeprefix("text_model.") for key in keys}
    if part == "vae":
        levels = count(r"decoder\.up_blocks\.(\d+)\.", keys)
        return {key: VAE + vae_name(key, levels) for key in keys}
    layers = 1 + max(
        [int(m[1]) for key in keys if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", key))], default=0
    )
    attends = {m[1] for key in keys if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}
    return {key: RAW + unet_name(key, layers, attends) for key in keys}


def count(pattern: str, keys: list[str]) -> int:
    """One more than the largest number that a pattern finds at the beginning of a key."""
    return 1 + max([int(m[1]) for key in keys if (m := re.match(pattern, key))], default=0)


def unet_name(key: str, layers: int, attends: set[str]) -> str:
    """layers: of a down block; attends: the up blocks with attention, behind which what scales up comes third."""
    for theirs, ours in UNET.items():
        if key.startswith(theirs + "."):
            key = ours + key.removeprefix(theirs)
    if block := re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    ):
        way, level, kind, i, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        place = level * (layers + 1) + i
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.{rest.replace('conv.', 'op.')}"
        if kind == "upsamplers":
            return f"output_blocks.{place + layers}.{2 if block[2] in attends else 1}.{rest}"
        name = f"input_blocks.{place + 1}" if way == "down" else f"output_blocks.{place}"
        key = f"{name}.{0 if kind == 'resnets' else 1}.{rest}"
    head, _, tail = key.rpartition(".")
    start, _, last = head.rpartition(".")
    inside = re.fullmatch(r"(input_blocks|output_blocks)\.\d+\.0|middle_block\.[02]", start)
    return f"{start}.{RESNET[last]}.{tail}" if inside and last in RESNET else key


def vae_name(key: str, levels: int) -> str:
    for theirs, ours in VAE_NAMES.items():
        key = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", lambda m: f"{m[1]}{ours}", key)  # noqa: B023  # used at once
    key = re.sub(r"^encoder\.down_blocks\.(\d+)", r"encoder.down.\1", key)
    key = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", key)
    return attention_name(re.sub(r"(?<=\d)\.resnets\.(\d+)", r".block.\1", key))


def attention_name(key: str) -> str:
    found = re.fullmatch(r"(.*\.mid\.attn_1\.)(.+)\.(weight|bias)", key)
    return f"{found[1]}{VAE_ATTENTION[found[2]]}.{found[3]}" if found and found[2] in VAE_ATTENTION else key


def original_names(keys: Iterable[str]) -> tuple[dict[str, str], str]:
    """Keys of one file -> the original's keys for the same numbers, and a prefix that all its networks stood behind."""
    keys = list(keys)
    wrapped = [key[: key.index(RAW)] for key in keys if RAW in key] or [
        key[: key.index(VAE)] for key in keys if VAE in key
    ]
    prefix = wrapped[0] if wrapped and len(set(wrapped)) == 1 else ""
    return {key: attention_name(key.removeprefix(prefix)) for key in keys}, prefix


# ---- files of other models

WHOLE = "name a whole InstructPix2Pix file, as `emilie download` fetches it"


def has(pattern: str, few: int | None = None) -> Callable:
    """Whether a file has a key that matches; few: and not more keys than that."""
    regex = re.compile(pattern)
    return lambda shapes: (few is None or len(shapes) <= few) and any(regex.search(key) for key in shapes)


def channels(*counts: int) -> Callable:
    """Whether the UNet's first layer takes so many channels."""
    names = (RAW + "input_blocks.0.0.weight", EMA + "diffusion_modelinput_blocks00weight")
    return lambda shapes: any(shapes[name][1:2] == (n,) for name in names if name in shapes for n in counts)


def text_width(width: int) -> Callable:
    """Whether the text model has vectors of this width."""
    names = [TEXT + inner + "embeddings.token_embedding.weight" for inner in ("", "text_model.")]
    return lambda shapes: any(shapes[name][1:] == (width,) for name in names if name in shapes)


def either(*tests: Callable) -> Callable:
    return lambda shapes: any(test(shapes) for test in tests)


def lacks(pattern: str) -> Callable:
    regex = re.compile(pattern)
    return lambda shapes: not any(regex.match(key) for key in shapes)


def both(*tests: Callable) -> Callable:
    return lambda shapes: all(test(shapes) for test in tests)


UNET_KEYS = r"^(model\.diffusion_model\.|model_ema\.diffusion_model)"
TELL_TALES: tuple[tuple[Callable[[Mapping[str, tuple[int, ...]]], bool], str], ...] = (
    (has(r"^v_pred$"), f"a model that predicts v (it has a tensor v_pred), not noise: {WHOLE}"),
    (
        has(r"(^|\.)(lora_[A-Za-z]|lora\.|lora_(up|down|A|B)\b)|\.(hada_w|lokr_w)|_lora\."),
        "a LoRA, which changes a model and is none: merge it into InstructPix2Pix's weights in the tool that it is "
        "for, and name the merged file",
    ),
    (
        has(r"^control_model\.|^controlnet_|controlnet_cond_embedding|^input_hint_block\.|^lllite_"),
        f"a ControlNet, which steers a model and is none: {WHOLE}",
    ),
    (has(r"^(ip_adapter|image_proj)\."), f"an IP-Adapter, which steers a model and is none: {WHOLE}"),
    (has(r"motion_modules\."), f"a motion module, for films: {WHOLE}"),
    (
        has(r"^(emb_params|string_to_param(\.\*)?|string_to_token|clip_[lg]|<.*>)$", few=8),
        f"a textual inversion embedding, one word's numbers: {WHOLE}",
    ),
    (
        both(has(r"^conditioner\.embedders\.|label_emb\."), channels(8)),
        f"an editor made from SDXL, of another shape than the released one: {WHOLE}",
    ),
    (
        has(r"^conditioner\.embedders\.|\.label_emb\.|\.add_embedding\."),
        f"SDXL, another model than InstructPix2Pix: {WHOLE}",
    ),
    (has(r"(^|\.)(double_blocks|joint_blocks)\.\d"), f"a diffusion transformer (SD3, FLUX, ...): {WHOLE}"),
    (
        either(has(r"^cond_stage_model\.model\."), text_width(1024)),
        f"made from Stable Diffusion 2, whose text model is another one, and not InstructPix2Pix: {WHOLE}",
    ),
    (channels(9), f"an inpainting model, which takes 9 channels and no instructions: {WHOLE}"),
    (channels(5), f"a depth model, which takes 5 channels: {WHOLE}"),
    (channels(7), f"an upscaler, which takes 7 channels: {WHOLE}"),
    (
        both(has(UNET_KEYS), lacks(r"first_stage_model\.")),
        f"without an autoencoder: add Stable Diffusion 1's (first_stage_model.*) to it, or {WHOLE}",
    ),
    (
        both(has(UNET_KEYS), lacks(r"cond_stage_model\.")),
        f"without a text model: add Stable Diffusion 1's (cond_stage_model.*) to it, or {WHOLE}",
    ),
    (
        has(r"\.(absmax|quant_map|quant_state\..*)$|^scaled_fp8$|\.scale_weight$"),
        f"quantized, which is not read: name the file in float16 or float32; {WHOLE}",
    ),
    (
        has(r"^(down_blocks|mid_block|up_blocks)\."),
        "the UNet of diffusers' layout alone: name the whole folder that diffusers wrote, with unet/, vae/ and "
        "text_encoder/ in it",
    ),
    (
        has(r"^(encoder|decoder)\.((down|up)(_blocks)?|mid(_block)?)\."),
        "an autoencoder alone: name the whole folder that diffusers wrote, with unet/, vae/ and text_encoder/ in it",
    ),
    (has(r"^text_model\.|^transformer\.resblocks\."), f"a text model alone: {WHOLE}"),
)


def tell_tale(shapes: Mapping[str, tuple[int, ...]], notes: Mapping[str, str] | None = None) -> str | None:
    """What a file is that cannot be used, by the shapes of its tensors and its writer's notes; None: nothing known."""
    for key, value in (notes or {}).items():
        if "prediction" in key and str(value).lower().startswith("v"):
            return f"a model that predicts v (its {key} says so), not noise: {WHOLE}"
    return next((sentence for test, sentence in TELL_TALES if test(shapes)), None)
