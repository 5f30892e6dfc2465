"""What a network costs and how large its activations begin: counted and measured without training.

python -m condot.models.cost                 the presets: parameters, multiply-adds
python -m condot.models.cost --activations   root mean squares after each block at the start
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
from .common.presets import IMAGENET
from .registry import NETWORKS, build, find_spec


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


def stages(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks that compute activations one after another, of any network; lists of embeddings are none."""
    spec = find_spec(network)
    return [(name, block) for name, block in named_blocks(network) if spec is None or spec.is_stage(name)]


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

    blocks = stages(network)
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
    """Yield the table of presets of each kind that has styles, in every style, in Markdown."""
    for spec in (spec for spec in NETWORKS.values() if spec.styles):
        columns = " | ".join(f"`{style}`: parameters | multiply-adds" for style in spec.styles)
        yield f"| preset | width | blocks | heads | {columns} |"
        yield f"|---|{'--:|' * (3 + 2 * len(spec.styles))}"
        for preset, sizes in spec.presets.items():
            cells = [preset, *(str(sizes[name]) for name in ("width", "depth", "heads"))]
            for style in spec.styles:
                network = build(spec.kind, device="meta", preset=preset, style=style, **IMAGENET)
                parameters, products = count_params_and_macs(network, (4, 32, 32))
                cells += [f"{parameters / 1e6:.2f} M", f"{products / 1e9:.2f} G"]
            yield f"| {' | '.join(cells)} |"


def _activations() -> Iterator[str]:
    """Yield the tables of activations at the start, in Markdown."""
    rows = [(spec.kind, title, dict(options)) for spec in NETWORKS.values() for title, options in spec.tabulated]
    for kind, title, options in rows:
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
