"""One computation by several implementations on the same weights: emilie's, however it is loaded, and diffusers'.

diffusers is never a dependency: it is imported here, when a comparison asks for it.
"""

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..emilie import Editor
from ..errors import EmilieError
from ..loading import load
from ..sampling import get_sigmas

WAYS = {  # to load emilie; all others are held against the first, and share its weights where they can
    "eager": {"plain": True},
    "default": {"compile": None},  # the command's: on CUDA graphs, on a CPU `faster.fast`
    "compiled": {"compile": True},
    "low memory": {"low_memory": True},
}
SCALES = {"text_scale": 7.5, "image_scale": 1.5}
Given = tuple[Tensor, Tensor, Tensor]  # z_img (B, 4, h, w), cond (B, 77, D), uncond (1, 77, D)
Noise = Callable[..., Tensor]


class Backend:
    """An editor as an edit uses it. Of its networks it keeps hold of none: in low memory they move."""

    def __init__(self, editor: Editor, rounding: torch.dtype):
        self.editor, self.rounding = editor, rounding  # the number format that explains by how much it may differ

    def step(self, x: Tensor, sigma: float, given: Given) -> Tensor:
        """One guided step of an edit: x (B, 4, h, w) -> denoised, the same."""
        return self.editor.denoise(x, sigma, *given, *SCALES.values())

    def encode(self, pixels: Tensor) -> Tensor:  # (B, 3, H, W) in [-1, 1] -> (B, 4, h, w), unscaled
        return self.editor.encode(pixels)

    def text(self, token_ids: Tensor) -> Tensor:  # (B, 77) -> (B, 77, D)
        return self.editor.text(token_ids)

    def sample(self, given: Given, noise: Tensor, steps: int, stream: Noise | None = None) -> Tensor:
        """From unit noise (B, 4, h, w) to a latent; stream: of the noise between the steps, None = its usual one."""
        sigmas = get_sigmas(steps, self.editor.alphas_cumprod)
        return self.editor.sample(*given, sigmas, noise, stream or noise_like(noise), **SCALES)

    def decode(self, z: Tensor) -> Tensor:  # (B, 4, h, w) -> (B, 3, H, W)
        return self.editor.decode(z)


def noise_like(x: Tensor, seed: int = 0) -> Noise:
    """A stream of unit normal latents, drawn on the CPU as an edit's are."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(x.shape, generator=generator)


class Diffusers(Backend):
    """diffusers' InstructPix2Pix pipeline with our weights, shared, and our text model, which is transformers' too.

    A step is `Editor.denoise` with its UNet; an edit is what the pipeline does. Compiled: as diffusers advises, the
    UNet alone, channels last.
    """

    def __init__(self, editor: Editor, compiled: bool = False):
        diffusers = import_diffusers()
        from diffusers.loaders import single_file_utils as convert

        unet, dd, diffusion = editor.config.unet, editor.config.vae, editor.config.diffusion
        attends = [2**level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
        with torch.device("meta"):
            network = diffusers.UNet2DConditionModel(
                in_channels=unet.in_channels, out_channels=unet.out_channels, layers_per_block=unet.num_res_blocks,
                block_out_channels=[m * unet.model_channels for m in unet.channel_mult],
                down_block_types=["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
                up_block_types=["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
                attention_head_dim=unet.num_heads,  # diffusers' historical name for how many heads there are
                cross_attention_dim=unet.context_dim, norm_num_groups=unet.num_groups,
            )  # fmt: skip
            vae = diffusers.AutoencoderKL(
                block_out_channels=[m * dd.ch for m in dd.ch_mult], layers_per_block=dd.num_res_blocks,
                down_block_types=["DownEncoderBlock2D"] * len(dd.ch_mult), latent_channels=dd.z_channels,
                up_block_types=["UpDecoderBlock2D"] * len(dd.ch_mult), norm_num_groups=dd.num_groups,
                scaling_factor=editor.scale_factor,
            )  # fmt: skip
        state = {f"model.diffusion_model.{k}": v for k, v in editor.unet.state_dict().items()}
        load_shared(network, convert.convert_ldm_unet_checkpoint(state, dict(network.config)))
        state = {f"first_stage_model.{k}": v for k, v in editor.vae.state_dict().items()}
        load_shared(vae, convert.convert_ldm_vae_checkpoint(state, dict(vae.config)))
        if compiled:
            network.to(memory_format=torch.channels_last).compile(dynamic=False)

        def eps(x: Tensor, t: Tensor, context: Tensor) -> Tensor:  # called as the pipeline calls it: compiled once
            no = {"added_cond_kwargs": None, "cross_attention_kwargs": None, "return_dict": False}
            return network(x, t[0], encoder_hidden_states=context, **no)[0]

        plain = Editor(editor.config, eps, vae, editor.text, device=editor.device, dtype=editor.dtype)
        super().__init__(plain, editor.dtype)
        scheduler = diffusers.EulerAncestralDiscreteScheduler(
            num_train_timesteps=diffusion.timesteps, beta_start=diffusion.linear_start, beta_end=diffusion.linear_end,
            beta_schedule="scaled_linear", timestep_spacing="linspace",
        )  # fmt: skip
        self.pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
            vae=vae, text_encoder=editor.text.transformer, tokenizer=None, unet=network, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        self.pipe.set_progress_bar_config(disable=True)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.pipe.vae.encode(pixels).latent_dist.mode()

    def text(self, token_ids: Tensor) -> Tensor:
        return self.pipe.text_encoder(token_ids)[0]

    def sample(self, given: Given, noise: Tensor, steps: int, stream: Noise | None = None) -> Tensor:
        """The pipeline between encoding and decoding; its usual noise is drawn on the device."""
        dtype, device, (z_img, cond, uncond) = self.editor.dtype, self.editor.device, given
        where = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
        with patch(where, lambda *_, **__: stream().to(device, dtype)) if stream else nullcontext():
            return self.pipe(
                image=z_img.to(dtype), prompt_embeds=cond.to(dtype), latents=noise.to(device, dtype),
                negative_prompt_embeds=uncond.expand_as(cond).to(dtype), num_inference_steps=steps,
                guidance_scale=SCALES["text_scale"], image_guidance_scale=SCALES["image_scale"], output_type="latent",
            ).images  # fmt: skip

    def decode(self, z: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.decode(z.to(self.editor.dtype) / vae.config.scaling_factor, return_dict=False)[0]


def builders(setting: Namespace) -> dict[str, Callable[[], Backend]]:
    """Each backend of a setting by name, the first way's first; when called it is built, once.

    Raises EmilieError at once where diffusers is to be compared with and is not installed.
    """
    asked = {"compile": setting.compile, "low_memory": setting.low_memory}

    def backend(options: dict) -> Backend:
        editor = load(setting.weights, setting.config, setting.device, setting.dtype, **options)
        half = options.get("low_memory") and editor.dtype == torch.float32  # on a CPU it holds its weights in half
        return Backend(editor, torch.float16 if half else editor.dtype)

    ways = {way: given for way, given in WAYS.items() if all(asked.get(key, True) for key in given if given[key])}
    made = {f"emilie, {way}": cache(partial(backend, options)) for way, options in ways.items()}
    if setting.against:
        import_diffusers()
        first = next(iter(made.values()))
        made["diffusers"] = cache(lambda: Diffusers(first().editor))
        if setting.compile:
            made["diffusers, compiled"] = cache(lambda: Diffusers(first().editor, compiled=True))
    return made


def import_diffusers():
    """The package, told to be quiet, and transformers too. Raises EmilieError where it is missing."""
    import transformers

    try:
        import diffusers
    except ImportError as error:
        raise EmilieError(f"--against diffusers needs that package: pip install diffusers ({error})") from error
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()  # diffusers imports parts of it that warn
    return diffusers


def load_shared(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Weights into a network made on the meta device, every one and no other, shared instead of copied."""
    network.load_state_dict(state, strict=True, assign=True)
    network.requires_grad_(False).eval()
