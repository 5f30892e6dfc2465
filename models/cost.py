"""What a network costs and how large its activations begin: counted and measured without training.

python -m models.cost                 the presets: parameters, multiply-adds
python -m models.cost --activations   root mean squares after each block at the start
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from condot.core.text_states import TextStates

from .common.conditioning import MICRO_CONDITIONS
from .dit.presets import PRESETS, STYLES
from .registry import build

LATENTS = {"channels": 4, "resolution": 32}
"""Images of 256 pixels a side in latents."""
IMAGENET = {**LATENTS, "num_classes": 1000}
EXAMPLES: list[tuple[str, str, dict[str, Any]]] = [
    ("dit S/2", "dit", {**IMAGENET, "preset": "S/2"}),
    ("dit S/2, modern", "dit", {**IMAGENET, "preset": "S/2", "style": "modern"}),
    ("cross_dit S/2", "cross_dit", {**LATENTS, "preset": "S/2", "text_width": 384, "pooled_width": 384}),
    ("mmdit", "mmdit", {**LATENTS, "patch_size": 2, "width": 384, "depth": 12, "heads": 6, "text_width": 384, "pooled_width": 384}),
    ("unet", "unet", {**IMAGENET, "block_channels": (64, 128, 256), "layers_per_block": 2, "attention_levels": 2, "head_width": 32}),
]
"""Title, kind and options of the networks whose activations are tabulated."""


def example_inputs(
    network: nn.Module, shape: Sequence[int], *, batch: int = 1, tokens: int = 77, text_width: int = 0, pooled_width: int = 0
) -> tuple[Any, ...]:
    """Arguments of a network's forward pass: normal noise, times spread over (0, 1), the first classes, or normal text.

    Args:
        network: on any device, meta too.
        shape: (C, H, W) of what it takes.
        batch: samples.
        tokens, text_width, pooled_width: of the text, for networks that take it.
    """
    first = next(network.parameters())
    like: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
    x, t = torch.randn(batch, *shape, **like), (torch.arange(batch, **like) + 0.5) / batch
    if getattr(network, "conditioning", "class") == "text":
        mask = torch.ones(batch, tokens, device=first.device, dtype=torch.bool)
        condition: Any = TextStates(torch.randn(batch, tokens, text_width, **like), mask, torch.randn(batch, pooled_width, **like))
    else:
        condition = torch.arange(batch, device=first.device) % (int(network.num_classes) + 1)  # type: ignore[arg-type]
    if not getattr(network, "micro_conditions", False):
        return x, t, condition
    return x, t, condition, torch.full((batch, MICRO_CONDITIONS), float(shape[1]), **like)


@torch.no_grad()
def count_params_and_macs(network: nn.Module, shape: Sequence[int], **text: int) -> tuple[int, int]:
    """What one sample costs.

    Args:
        network: of any kind, on any device, whole or sharded; nothing is computed.
        shape: (C, H, W) of what it takes.
        text: `tokens`, `text_width` and `pooled_width`, for networks that take text.

    Returns:
        Parameters, and multiply-adds of a forward pass: matrix products and
        convolutions, attention's two among them; half of what is called FLOPs.
    """
    held = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in held.items()}
    with FlopCounterMode(display=False) as counter:  # on meta, where attention is products: fused kernels are not all counted
        functional_call(network, meta, tuple(_to_meta(part) for part in example_inputs(network, shape, **text)))
    return sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops() // 2


def _to_meta(part: Any) -> Any:
    return part.to("meta") if isinstance(part, Tensor) else TextStates(*(value.to("meta") for value in part))


def named_blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a network by name, in order: the members of its lists of modules, the outermost ones only."""
    inside: list[str] = []
    for name, module in network.named_modules():
        if name.endswith("mid_block"):
            yield name, module
        elif isinstance(module, nn.ModuleList) and not any(name.startswith(other) for other in inside):
            yield from ((f"{name}.{index}", member) for index, member in enumerate(module))
        else:
            continue
        inside.append(f"{name}.")


@torch.no_grad()
def activation_rms(network: nn.Module, *arguments: Any) -> dict[str, float]:
    """Root mean square of what each block gives and, where it has them, its attention and its feed-forward net; '' is the output.

    Args:
        network: of any kind.
        arguments: of its forward pass.

    Returns:
        By name, in the order of the forward pass.
    """
    found: dict[str, float] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            found[name] = float(_tensor(output).double().square().mean().sqrt())

        return hook

    blocks = [(name, module) for name, module in named_blocks(network) if not name.startswith("conditions")]
    branches = [
        (f"{name}.{part}", child)
        for name, block in blocks
        for part, child in block.named_modules()
        if part.rpartition(".")[2] in ("attention", "cross", "feed_forward")
    ]
    handles = [module.register_forward_hook(note(name)) for name, module in [*blocks, *branches, ("", network)]]
    try:
        network(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tensor(output: Any) -> Tensor:
    """What a block gives; of several, the first: image tokens before text, or before what skips over."""
    return output if isinstance(output, Tensor) else next(part for part in output if isinstance(part, Tensor))


def _presets() -> Iterator[str]:
    """The table of presets in both styles, in Markdown."""
    yield "| preset | width | blocks | heads | `dit`: parameters | multiply-adds | `modern`: parameters | multiply-adds |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for preset, sizes in PRESETS.items():
        cells = [preset, *(str(sizes[name]) for name in ("width", "depth", "heads"))]
        for style in STYLES:
            parameters, products = count_params_and_macs(build("dit", device="meta", preset=preset, style=style, **IMAGENET), (4, 32, 32))
            cells += [f"{parameters / 1e6:.2f} M", f"{products / 1e9:.2f} G"]
        yield f"| {' | '.join(cells)} |"


def _activations() -> Iterator[str]:
    """The tables of activations at the start, one a kind, in Markdown."""
    for title, kind, options in EXAMPLES:
        network = build(kind, seed=0, **options)
        torch.manual_seed(0)
        text = {"text_width": options.get("text_width", 0), "pooled_width": options.get("pooled_width", 0)}
        found = activation_rms(network, *example_inputs(network, (4, 32, 32), batch=4, **text))
        names = {name for name, _ in named_blocks(network)}
        blocks = [name for name in found if name in names]
        parts = list(dict.fromkeys(name.removeprefix(f"{block}.") for block in blocks for name in found if name.startswith(f"{block}.")))
        yield from (f"`{title}`: the output {found['']:g}", "")
        yield f"| {' | '.join(['block', 'after it', *parts])} |"
        yield f"|---|{'--:|' * (len(parts) + 1)}"
        for block in blocks:
            values = [found[block], *(found.get(f"{block}.{part}", float("nan")) for part in parts)]
            yield f"| {block} | {' | '.join('' if isnan(value) else f'{value:.3f}' for value in values)} |"
        yield ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables of docs/models.md.")
    parser.add_argument("--activations", action="store_true", help="root mean squares at the start, by block")
    options = parser.parse_args(arguments)
    print("\n".join(_activations() if options.activations else _presets()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
