"""Fine-tuning by a few numbers: low-rank adapters beside frozen linear maps, through `peft`.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from .cross_dit.model import CrossDiT
from .dit.model import DiT
from .mmdit.model import MMDiT
from .unet.model import UNet

LoraTarget = Literal["attention", "feed_forward", "modulation"]
LORA_TARGETS: dict[type[nn.Module], dict[LoraTarget, str]] = {
    DiT: {
        "attention": r"blocks\.\d+\.attention\.(qkv|out)",
        "feed_forward": r"blocks\.\d+\.feed_forward\.(enter|leave)",
        "modulation": r"(blocks\.\d+\.|shared_)?modulation",
    },
    MMDiT: {
        "attention": r"blocks\.\d+\.((image|text)\.(heads\.linear|out)|own\.linear|own_out)",
        "feed_forward": r"blocks\.\d+\.(image|text)\.feed_forward\.(enter|leave)",
        "modulation": r"(blocks\.\d+\.(image|text)\.)?modulation",
    },
    CrossDiT: {
        "attention": r"blocks\.\d+\.(attention\.(qkv|out)|cross\.(q|kv|out))",
        "feed_forward": r"blocks\.\d+\.feed_forward\.(enter|leave)",
        "modulation": r"modulation",
    },
    UNet: {
        "attention": r"net\..*\.(to_q|to_k|to_v|to_out\.0)",
        "feed_forward": r"net\..*\.ff\.net\.(0\.proj|2)",
        "modulation": r"net\..*\.time_emb_proj",
    },
}
"""The linear maps of each kind that adapters may stand beside, by their names. A map whose parts are joined has one adapter of the rank."""


def add_lora(network: nn.Module, rank: int, alpha: float, targets: tuple[LoraTarget, ...] = ("attention",), seed: int = 0) -> int:
    """Put adapters into a network, in place; from then on only they are trained. Its output stays as it was.

    Weights are loaded before (their names change), merged by `merge_lora` before conversion.

    Args:
        network: a DiT, MMDiT, CrossDiT or UNet.
        rank: of each adapter, at least 1.
        alpha: what an adapter adds counts alpha / rank times.
        targets: which layers; see LORA_TARGETS.
        seed: of the adapters' first halves; the second halves begin at zero.

    Returns:
        The number of adapted layers.

    Raises:
        ValueError: another class, no such layers, a rank below 1, adapters already there, or peft not installed.
    """
    peft = _import_peft()
    layers = next((groups for kind, groups in LORA_TARGETS.items() if isinstance(network, kind)), None)
    if layers is None:
        raise ValueError(f"{type(network).__name__} takes no LoRA: {', '.join(kind.__name__ for kind in LORA_TARGETS)} do.")
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
