"""One computation by several implementations on the same weights: ours, diffusers' and the original's.

diffusers and the original are never dependencies: they are imported here, when a comparison asks for them. An entrant
offers `step`, and all but the original's the stages of an edit too: `encode`, `text`, `denoise`, `decode`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from .. import sampling
from ..emilie import Editor
from ..errors import EmilieError
from ..loading import load

SCALES = {"text_scale": 7.5, "image_scale": 1.5}
Step = Callable[[Tensor, float], Tensor]
Noise = Callable[..., Tensor]


class Entrant:
    """What is measured. It keeps no more of the editor than the weights it computes with."""

    whole = True  # whether it does whole edits, or steps alone

    def __init__(self, editor: Editor, compiled: bool = False):
        self.config, self.device, self.dtype, self.compiled = editor.config, editor.device, editor.dtype, compiled
        self.factor = editor.vae.factor
        self.alphas_cumprod, self.log_sigmas = editor.alphas_cumprod, editor.log_sigmas
        self.rounding = editor.dtype  # what it may differ by: a low-memory editor holds its weights in half

    def stepper(self, z_img: Tensor, cond: Tensor, uncond: Tensor) -> Step:
        """One guided step of an edit, (x, sigma) -> denoised, all (B, 4, h, w); what an edit prepares once is done."""
        z_img = torch.cat([z_img, z_img, torch.zeros_like(z_img)]).to(self.dtype)
        context = torch.cat([c.expand(len(z_img) // 3, -1, -1) for c in (cond, uncond, uncond)]).to(self.dtype)

        def step(x: Tensor, sigma: float) -> Tensor:
            t = sampling.sigma_to_t(torch.tensor(sigma), self.log_sigmas).float().to(self.device)
            z_t = (x / (sigma**2 + 1) ** 0.5).to(self.dtype)
            eps = self.eps(torch.cat([z_t.repeat(3, 1, 1, 1), z_img], dim=1), t.expand(len(z_img)), context)
            return sampling.guide(
                *sampling.to_denoised(eps.float(), x.repeat(3, 1, 1, 1), sigma).chunk(3), *SCALES.values()
            )

        return step


class Ours(Entrant):
    """An editor, as an edit uses it."""

    def __init__(self, editor: Editor):
        super().__init__(editor, getattr(editor, "compiled", False))  # on a CPU the fast path is not
        self.editor, self.unet, self.networks = editor, editor.unet, [editor.unet, editor.vae, editor.text]
        self.rounding = next(self.unet.parameters()).dtype

    def stepper(self, z_img: Tensor, cond: Tensor, uncond: Tensor) -> Step:
        sigmas = sampling.get_sigmas(4, self.alphas_cumprod)
        denoise = self.editor.denoiser(sigmas, z_img, cond, uncond, torch.ones(1, device=self.device))
        return lambda x, sigma: denoise(x, sigma, *SCALES.values())

    def encode(self, pixels: Tensor) -> Tensor:  # (B, 3, H, W) in [-1, 1] -> (B, 4, h, w), unscaled
        return self.editor.vae.encode(pixels).float()

    def text(self, token_ids: Tensor) -> Tensor:  # (B, 77) -> (B, 77, D)
        return self.editor.text(token_ids)

    def denoise(
        self, z_img: Tensor, cond: Tensor, uncond: Tensor, noise: Tensor, steps: int, stream: Noise | None = None
    ) -> Tensor:
        """From unit noise (B, 4, h, w) to a latent; stream: of the noise between the steps, None = as an edit's."""
        sigmas = sampling.get_sigmas(steps, self.alphas_cumprod)
        stream = stream or sampling.noise_stream(tuple(noise.shape), 0, "edit", 0)
        return self.editor.sample(z_img, cond, uncond, sigmas, noise, stream, **SCALES)

    def decode(self, z: Tensor) -> Tensor:  # (B, 4, h, w) -> (B, 3, H, W)
        return self.editor.decode(z)


class Diffusers(Entrant):
    """diffusers' InstructPix2Pix pipeline with our weights, shared, and our text model, which is transformers' too."""

    def __init__(self, editor: Editor, compiled: bool = False):
        super().__init__(editor, compiled)
        diffusers = import_diffusers()
        from diffusers.loaders import single_file_utils as convert

        unet, dd, diffusion = editor.config.unet, editor.config.vae, editor.config.diffusion
        attends = [2**level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
        with torch.device("meta"):
            self.unet = diffusers.UNet2DConditionModel(
                in_channels=unet.in_channels,
                out_channels=unet.out_channels,
                block_out_channels=[m * unet.model_channels for m in unet.channel_mult],
                down_block_types=["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
                up_block_types=["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
                layers_per_block=unet.num_res_blocks,
                attention_head_dim=unet.num_heads,  # diffusers' historical name for how many heads there are
                cross_attention_dim=unet.context_dim,
                norm_num_groups=unet.num_groups,
            )
            vae = diffusers.AutoencoderKL(
                block_out_channels=[m * dd.ch for m in dd.ch_mult],
                down_block_types=["DownEncoderBlock2D"] * len(dd.ch_mult),
                up_block_types=["UpDecoderBlock2D"] * len(dd.ch_mult),
                layers_per_block=dd.num_res_blocks,
                latent_channels=dd.z_channels,
                norm_num_groups=dd.num_groups,
                scaling_factor=editor.scale_factor,
            )
        state = {f"model.diffusion_model.{k}": v for k, v in editor.unet.state_dict().items()}
        adopt(self.unet, convert.convert_ldm_unet_checkpoint(state, dict(self.unet.config)))
        state = {f"first_stage_model.{k}": v for k, v in editor.vae.state_dict().items()}
        adopt(vae, convert.convert_ldm_vae_checkpoint(state, dict(vae.config)))
        self.networks = [self.unet, vae, editor.text.transformer]
        if compiled:
            self.unet.compile(mode="max-autotune" if self.device.type == "cuda" else "default", dynamic=False)
        scheduler = diffusers.EulerAncestralDiscreteScheduler(
            num_train_timesteps=diffusion.timesteps,
            beta_start=diffusion.linear_start,
            beta_end=diffusion.linear_end,
            beta_schedule="scaled_linear",
            timestep_spacing="linspace",
        )
        self.pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
            vae=vae,
            text_encoder=editor.text.transformer,
            tokenizer=None,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.pipe.set_progress_bar_config(disable=True)

    def eps(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]

    def encode(self, pixels: Tensor) -> Tensor:
        return self.pipe.vae.encode(pixels).latent_dist.mode()

    def text(self, token_ids: Tensor) -> Tensor:
        return self.pipe.text_encoder(token_ids)[0]

    def denoise(
        self, z_img: Tensor, cond: Tensor, uncond: Tensor, noise: Tensor, steps: int, stream: Noise | None = None
    ) -> Tensor:
        """The pipeline between encoding and decoding; stream: as for `Ours`, None = its own, drawn on the device."""
        where = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
        with patch(where, lambda *_, **__: stream().to(self.device, self.dtype)) if stream else nullcontext():
            return self.pipe(
                image=z_img.to(self.dtype),
                prompt_embeds=cond.to(self.dtype),
                negative_prompt_embeds=uncond.expand_as(cond).to(self.dtype),
                latents=noise.to(self.device, self.dtype),
                num_inference_steps=steps,
                guidance_scale=SCALES["text_scale"],
                image_guidance_scale=SCALES["image_scale"],
                output_type="latent",
            ).images

    def decode(self, z: Tensor) -> Tensor:
        return self.pipe.vae.decode(z.to(self.dtype) / self.pipe.vae.config.scaling_factor, return_dict=False)[0]


class Original(Entrant):
    """The UNet of a checkout of timothybrooks/instruct-pix2pix; in half precision under autocast, as its scripts do."""

    whole = False

    def __init__(self, editor: Editor, folder: str | Path):
        super().__init__(editor)
        params = editor.config.unet
        keys = ("in_channels", "out_channels", "model_channels", "attention_resolutions", "channel_mult")
        keys += ("num_res_blocks", "num_heads", "context_dim")
        fixed = {"image_size": 32, "use_spatial_transformer": True, "transformer_depth": 1, "legacy": False}
        try:
            with importable(original(folder)), torch.device("meta"):
                from ldm.modules.diffusionmodules.openaimodel import UNetModel

                self.unet = UNetModel(**{key: getattr(params, key) for key in keys}, **fixed, use_checkpoint=False)
            adopt(self.unet, {key: value.float() for key, value in editor.unet.state_dict().items()})
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            raise EmilieError(
                f"the original's UNet in {folder} cannot be used: {str(error).splitlines()[0]}"
            ) from error
        self.networks = [self.unet]

    def eps(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else nullcontext():
            return self.unet(x.float(), timesteps=t, context=context.float())


def builders(setting) -> dict[str, Callable[[], Entrant]]:
    """Each entrant of a `measure.Setting` by name, ours first, to be built when called. Raises EmilieError at once for
    what cannot be compared with: diffusers that is not installed, a folder that holds no original."""
    open_editor = partial(load, setting.weights, setting.config, setting.device, setting.dtype)
    plain = cache(open_editor)  # one set of weights for all that share them
    made = {"emilie": lambda: Ours(plain())}
    if setting.compile:
        made["emilie, fast"] = lambda: Ours(open_editor(compile=True))
    if setting.low_memory:
        made["emilie, low memory"] = lambda: Ours(open_editor(low_memory=True))
    for what in setting.against:
        if what == "diffusers":
            import_diffusers()
            made["diffusers"] = lambda: Diffusers(plain())
            if setting.compile:
                made["diffusers, compiled"] = lambda: Diffusers(plain(), compiled=True)
        else:
            made[f"original in {original(what).parent.name}"] = lambda what=what: Original(plain(), what)
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


def original(folder: str | Path) -> Path:
    """The folder inside a checkout from which `ldm` is imported. Raises EmilieError where it is not there."""
    inside = Path(folder).resolve() / "stable_diffusion"
    if not (inside / "ldm/modules/diffusionmodules/openaimodel.py").is_file():
        raise EmilieError(
            f"--against {folder}: neither diffusers nor a checkout of timothybrooks/instruct-pix2pix, "
            "which holds stable_diffusion/ldm/modules/diffusionmodules/openaimodel.py"
        )
    return inside


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """`ldm` from this folder, and afterwards from nowhere, so that another checkout's can follow."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "ldm"]:
            del sys.modules[name]


def adopt(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Weights into a network made on the meta device, every one and no other, shared instead of copied."""
    network.load_state_dict(state, strict=True, assign=True)
    network.requires_grad_(False).eval()
