"""Look into the UNet, or reach into it, by module name; outside these contexts nothing of it is left.

    name = "output_blocks.4.1.transformer_blocks.0.attn1.to_q"
    with hooks.capture(editor.unet, [name, "output_blocks.4.0.out_layers"]) as seen:
        eps = editor.unet(z, t, context)                # seen[name]: (B, N, C), all heads side by side
    with hooks.override(editor.unet, seen):             # or {name: lambda q: 1.2 * q}
        eps = editor.unet(z, t, other_context)

Any name in `unet.named_modules()` does whose module gives one tensor. "...attn1.to_q", ".to_k", ".to_v" are what
self-attention works with, "...attn2..." attention to the text; a ResBlock's "out_layers" is its residual branch (B, C,
h, w), before the skip connection is added to it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches

from torch import Tensor, nn

from ..errors import SamplingError


@contextmanager
def capture(unet: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what the named modules compute: a dict by name, of the latest pass. Raises SamplingError for a name."""
    seen = {}

    def keep(name: str) -> Callable:
        return lambda module, args, output: seen.__setitem__(name, output)

    with _hooked(unet, {name: keep(name) for name in names}):
        yield seen


@contextmanager
def override(unet: nn.Module, values: Mapping[str, Tensor | Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Put tensors in the place of what the named modules compute, or functions of it.

    A tensor of batch 1 serves a whole batch, such as the two halves of guidance. A pass raises SamplingError where a
    tensor does not fit; an unknown name does at once.
    """

    def put(name: str, value: Tensor | Callable[[Tensor], Tensor]) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            new = value if isinstance(value, Tensor) else value(output)
            if new.shape[1:] != output.shape[1:] or new.shape[0] not in (1, output.shape[0]):
                raise SamplingError(
                    f"{name} gives {tuple(output.shape)} and its override has {tuple(new.shape)}: "
                    "only a batch of 1 is expanded"
                )
            return new.to(output.device, output.dtype).expand_as(output)

        return hook

    with _hooked(unet, {name: put(name, value) for name, value in values.items()}):
        yield


@contextmanager
def _hooked(unet: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    modules = {name: module for name, module in unet.named_modules() if name}
    for name in hooks:
        if name not in modules:
            close = get_close_matches(name, modules, n=3, cutoff=0.5)
            advice = f"did you mean {' or '.join(close)}?" if close else "unet.named_modules() lists them"
            raise SamplingError(f"the UNet has no module {name!r}: {advice}")
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.enter_context(modules[name].register_forward_hook(hook))
        yield
