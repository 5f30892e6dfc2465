"""Fine-tuning by a few numbers: low-rank adapters beside frozen linear maps, through `peft`.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .common.spec import LoraTarget
from .registry import NETWORKS, find_spec


def add_lora(network: nn.Module, rank: int, alpha: float, targets: tuple[LoraTarget, ...] = ("attention",), seed: int = 0) -> int:
    """Put adapters into a network, in place; from then on only they are trained. Its output stays as it was.

    Weights are loaded before (their names change), merged by `merge_lora` before conversion.

    Args:
        network: of a kind that takes adapters.
        rank: of each adapter, at least 1.
        alpha: what an adapter adds counts alpha / rank times.
        targets: which layers; see `NetworkSpec.lora_targets`.
        seed: of the adapters' first halves; the second halves begin at zero.

    Returns:
        The number of adapted layers.

    Raises:
        ValueError: another class, no such layers, a rank below 1, adapters already there, or peft not installed.
    """
    peft = _import_peft()
    spec = find_spec(network)
    if spec is None or not spec.lora_targets:
        known = ", ".join(one.network.__name__ for one in NETWORKS.values() if one.lora_targets)
        raise ValueError(f"{type(network).__name__} takes no LoRA: {known} do.")
    layers = spec.lora_targets
    if rank < 1 or alpha <= 0:
        raise ValueError(f"LoRA of rank {rank} and alpha {alpha}: both are positive. Use 16 and 16.")
    unknown = [group for group in targets if group not in layers]
    if unknown or not targets:
        raise ValueError(f"LoRA targets {targets} are unknown: choose of {', '.join(layers)}.")
    if any(True for _ in _adapted_layers(network)):
        raise ValueError("the network has LoRA adapters already: merge them first.")
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    chosen = {group: [re.escape(name) for name in names if re.fullmatch(layers[group], name)] for group in targets}
    for group in targets:
        if not chosen[group]:
            raise ValueError(f"LoRA target {group}: this {type(network).__name__} has no such layers. Leave it out.")
    pattern = "|".join(name for group in chosen.values() for name in group)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=f"({pattern})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, network)
    return sum(1 for _ in _adapted_layers(network))


def merge_lora(network: nn.Module) -> nn.Module:
    """Add the adapters to the weights they stand beside and take them out, in place; every weight may be trained again.

    Returns:
        The same network, with the names and shapes that it had before `add_lora`.
    """
    for name, layer in list(_adapted_layers(network)):
        layer.merge()
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, layer.get_base_layer())
    return network.requires_grad_(True)


def _adapted_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in network.named_modules() if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"))


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA needs the package peft, which is not installed: pip install peft.") from error
    return peft
