"""Training that starts from published weights: what recipe they need, and how they come into a network of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .convert import from_stock
from .cross_dit.convert import cross_dit_options
from .cross_dit.model import CrossDiT
from .dit.convert import dit_from_original
from .dit.model import DiT
from .dit.presets import SIZES
from .mmdit.convert import mmdit_options
from .mmdit.model import MMDiT
from .published import ORIGINAL, PublishedWeights, build_stock, check_tensors, load_published
from .unet.convert import unet_options
from .unet.model import UNet

KIND_NAMES = {DiT: "dit", MMDiT: "mmdit", CrossDiT: "cross_dit", UNet: "unet"}
CLASS_TABLES = ("classes.weight", "class_embedding.weight")
OPTIONAL_PREFIXES = ("sizes.", "net.add_embedding.")
"""What a network may have beyond the published one: it begins without a say."""
DATA = {
    "channels": "channels of an image",
    "text_width": "of a token of data.text_encoder",
    "pooled_width": "of its pooled text",
}
STOCK_FLOWS = {
    "SD3Transformer2DModel": ("condot", "velocity"), "UNet2DConditionModel": ("ddpm_scaled_linear", "noise"),
}  # fmt: skip
ORIGINAL_FLOWS = {"sit": ("condot", "velocity"), "original": ("ddpm", "noise")}
"""The same of checkpoints of SiT's and DiT's own code."""
PATH_OF_SCHEDULE = {"linear": "ddpm", "scaled_linear": "ddpm_scaled_linear", "squaredcos_cap_v2": "ddpm_cosine"}
PREDICTION_OF_TYPE = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}


class RecipeRequirements(NamedTuple):
    """What published weights ask of a recipe."""

    model: dict[str, Any]
    """Fields of the section `model`, `kind` among them."""
    data: dict[str, int]
    """What the data must be: channels, resolution and, with text, its widths."""
    flow: dict[str, str]
    """`path` and `predict` of the section `flow` that the weights were trained with; empty where they do not say."""

    def __str__(self) -> str:
        said = " ".join(f"model.{name}={_format_value(value)}" for name, value in self.model.items())
        return said if self.flow else f"{said} model.clock=original for DiT's or sit for SiT's (the file does not say whose it is)"


class InitReport(NamedTuple):
    """What became of published weights."""

    required: RecipeRequirements
    tensors: int
    """So many of the network's were taken."""
    notes: tuple[str, ...]
    """What was not taken as it is, one line each."""


def recipe_of(name: str) -> RecipeRequirements:
    """The recipe that published weights need; arguments and errors as of `load_published`."""
    return _requirements_of(load_published(name))


def init_from_published(name: str, network: nn.Module, factor: float | None = None) -> InitReport:
    """Begin a network with published weights.

    A class table of other classes begins afresh, but for its null row; learned
    variances are left out; micro-conditions that the weights do not know begin
    without a say. Everything else must fit.

    Args:
        name: as of `load_published`.
        network: a DiT, MMDiT, CrossDiT or UNet, with values, not sharded yet.
        factor: on the output layer; None for -1 where the weights predict a flow's velocity, which in diffusers
            points from data to noise, and 1 elsewhere. Checkpoints of the original SiT point as ours do.

    Raises:
        ValueError: weights that do not fit, with all that is missing, unexpected or
            misshapen, and the fields of the recipe with which they would.
    """
    found = load_published(name)
    required = _requirements_of(found)
    kind = next((word for known, word in KIND_NAMES.items() if isinstance(network, known)), type(network).__name__)
    remedy = f"They fit with {required}; {', '.join(f'{value} {DATA[key]}' for key, value in required.data.items() if key in DATA)}."
    if kind != required.model["kind"]:
        raise ValueError(f"init_from={name!r} holds a {found.kind}, which is no model.kind={kind}. {remedy}")
    state, notes = _convert_tensors(found, required, network, factor)
    if found.variant:
        notes.append(f"the full weights are not there, and those of the variant {found.variant} are taken")
    if not required.flow:
        notes.append(f"the file does not say whether it is DiT's or SiT's: it is read as model.clock={network.clock}, as the recipe has it")
    own = network.state_dict()
    state, more = _fit_class_tables(state, own)
    fresh = sorted(key for key in own.keys() - state.keys() if key.startswith(OPTIONAL_PREFIXES))
    if fresh:
        more.append(f"the weights know no micro-conditions: {len(fresh)} tensors begin afresh, without a say")
    check_tensors(
        name, f"this model.kind={kind}", state | {key: own[key] for key in fresh}, {key: v.shape for key, v in own.items()}, remedy
    )
    _check_options(name, required, network, remedy)
    if network.resolution != required.data["resolution"]:
        more.append(f"the weights were trained at a resolution of {required.data['resolution']}, which is {network.resolution} here")
    network.load_state_dict(state, strict=False)
    return InitReport(required, len(state), (*notes, *more))


def _requirements_of(found: PublishedWeights) -> RecipeRequirements:
    facts: dict[str, Any]
    if found.kind == ORIGINAL:
        facts = _original_options(found)
        return _build_requirements("dit", facts, ORIGINAL_FLOWS.get(found.clock))
    config = found.config
    flow = _trained_flow(found)
    if found.kind == "DiTTransformer2DModel":
        facts = {
            "channels": config["in_channels"], "resolution": config["sample_size"], "patch_size": config["patch_size"],
            "width": config["num_attention_heads"] * config["attention_head_dim"], "depth": config["num_layers"],
            "heads": config["num_attention_heads"], "clock": "diffusers", "own_conditions": True if _is_untied(found.state) else None,
        }  # fmt: skip
        return _build_requirements("dit", facts, flow)
    if found.kind == "SD3Transformer2DModel":
        return _build_requirements("mmdit", mmdit_options(config, found.state), flow)
    if found.kind == "PixArtTransformer2DModel":
        facts = cross_dit_options(config)
        del facts["pooled_width"]
        return _build_requirements("cross_dit", facts, flow)
    return _build_requirements("unet", _unet_options(config, found.kind == "UNet2DConditionModel"), flow)


def _unet_options(config: Mapping[str, Any], text: bool) -> dict[str, Any]:
    """The options of a UNet that its weights decide, said in the plainest way."""
    facts = unet_options(config, text)
    facts.pop("num_classes", None)
    levels, where = len(facts["block_channels"]), facts["attention_at"]
    coarsest = where == tuple(range(levels - len(where), levels))
    facts["attention_at" if coarsest else "attention_levels"] = None
    if facts["layout"] == "plain":
        facts["layout"] = None
    if not facts.get("micro_conditions"):
        facts |= {"pooled_width": None, "micro_conditions": None}
    return {key: value for key, value in facts.items() if value is not None}


def _is_untied(state: Mapping[str, Tensor]) -> bool:
    """Whether the blocks of a stock DiT embed time and class differently."""
    first = "transformer_blocks.0."
    parts = [key.removeprefix(first) for key in state if key.startswith(f"{first}norm1.emb.")]
    depth = sum(key.endswith(".attn1.to_q.weight") for key in state)
    return any(not torch.equal(state[f"transformer_blocks.{i}.{part}"], state[first + part]) for part in parts for i in range(1, depth))


def _build_requirements(kind: str, facts: dict[str, Any], flow: tuple[str, str] | None) -> RecipeRequirements:
    data: dict[str, int] = {key: facts.pop(key) for key in ("channels", "resolution", "text_width", "pooled_width") if key in facts}
    model = {"kind": kind, **{key: value for key, value in facts.items() if value is not None}}
    return RecipeRequirements(model, data, {"path": flow[0], "predict": flow[1]} if flow else {})


def _trained_flow(found: PublishedWeights) -> tuple[str, str]:
    """Path and prediction, as the scheduler beside the weights says, or as is usual for the class."""
    facts = found.scheduler
    if facts.get("prediction_type") == "flow_prediction" or "FlowMatch" in str(facts.get("_class_name")):
        return "condot", "velocity"
    path, predict = STOCK_FLOWS.get(found.kind, ("ddpm", "noise"))
    return PATH_OF_SCHEDULE.get(str(facts.get("beta_schedule")), path), PREDICTION_OF_TYPE.get(str(facts.get("prediction_type")), predict)


def _original_options(found: PublishedWeights) -> dict[str, Any]:
    """Return sizes of an original checkpoint, as far as they can be read off; DiT's and SiT's tensors are alike."""
    state = found.state
    absent = [key for key in ("x_embedder.proj.weight", "pos_embed") if key not in state]
    if absent or state["x_embedder.proj.weight"].ndim != 4 or state["pos_embed"].ndim != 3:
        raise ValueError(
            f"init_from={found.name!r} is no checkpoint of DiT or SiT: it lacks {', '.join(absent) or 'their shapes'}. "
            f"For weights of diffusers give the folder with their config.json."
        )
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    heads = {sizes["width"]: sizes["heads"] for sizes in SIZES.values()}
    return {
        "channels": channels, "resolution": math.isqrt(state["pos_embed"].shape[1]) * patch_size, "patch_size": patch_size, "width": width,
        "depth": sum(key.endswith(".attn.qkv.weight") for key in state), "heads": heads.get(width),
        "clock": found.clock or None,
    }  # fmt: skip


def _convert_tensors(
    found: PublishedWeights, required: RecipeRequirements, network: nn.Module, factor: float | None
) -> tuple[dict[str, Tensor], list[str]]:
    """The published tensors under our names, and what is to be said of them."""
    twice = 2 * required.data["channels"]
    if found.kind == ORIGINAL:
        heads = required.model.get("heads") or int(network.blocks[0].attention.heads)  # type: ignore[index, union-attr]  # a ModuleList of blocks
        ours: nn.Module = dit_from_original(found.state, clock=network.clock, heads=heads)  # type: ignore[arg-type]
        variances = len(found.state["final_layer.linear.weight"]) == twice * required.model["patch_size"] ** 2
    else:
        with torch.device("meta"):
            stock = build_stock(found.kind, found.config)
        stock.load_state_dict(found.state, assign=True)
        sign = -1.0 if required.flow["predict"] == "velocity" else 1.0
        ours = from_stock(stock, sign if factor is None else factor)
        variances = found.config.get("out_channels") == twice and found.kind in ("DiTTransformer2DModel", "PixArtTransformer2DModel")
    return ours.state_dict(), ["the variances that the weights also predict are left out"] if variances else []


def _fit_class_tables(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tables of as many classes as the network has; rows before the last that repeat the null row are no classes."""
    state, notes = dict(state), []
    for key in [key for key in state if key.endswith(CLASS_TABLES) and key in own and state[key].shape[1:] == own[key].shape[1:]]:
        table, null = state[key], state[key][-1:]
        others = (table != null).any(dim=1).nonzero()
        classes, wanted = int(others.max()) + 1 if len(others) else 0, len(own[key]) - 1
        if classes == wanted or len(table) == wanted + 1:
            state[key] = torch.cat([table[:wanted], null])
        else:
            state[key] = torch.cat([own[key][:-1].to(null), null])
            notes.append(f"{wanted} classes begin afresh in place of the weights' {classes}; the null class is theirs")
    return state, notes[:1]


def _check_options(name: str, required: RecipeRequirements, network: nn.Module, remedy: str) -> None:
    """Raises ValueError for what no shape shows: heads, clocks, positions, details of the U-Net."""
    want = dict(required.model)
    have: dict[str, Any]
    if isinstance(network, UNet):
        have = _unet_options(network.net.config, network.conditioning == "text")
        have = {key: have.get(key) for key in {**have, **want} if key not in (*DATA, "resolution", "kind", "micro_conditions")}
    elif isinstance(network, DiT):
        have = {"heads": network.enter.out_features // network.head_width, "clock": network.clock, "rope": network.rope}
        have |= {"rms_norm": network.rms_norm, "positions": "sincos" if network.fixed_positions else "none"}
        want = {"rope": False, "rms_norm": False, "positions": "sincos", "heads": have["heads"], **want}
        embedding = want.setdefault("clock", network.clock if network.clock in ORIGINAL_FLOWS else "original or sit")
        if (embedding, network.clock) == ("diffusers", "original"):
            want["clock"] = network.clock  # stock copies of the original do not tell how time was embedded
    elif isinstance(network, MMDiT):
        have = {"heads": network.blocks[0].image.heads.heads, "position_grid": network.positions.grid}  # type: ignore[union-attr]
        if network.positions.grid:
            tokens = required.data["resolution"] // want["patch_size"]
            have["position_line"] = network.positions.line
            want.setdefault("position_line", (0.0, tokens / max(want["position_grid"], 1)))
    else:
        have = {"heads": network.blocks[0].cross.heads}  # type: ignore[union-attr, index]
        if network.resolution == required.data["resolution"]:
            have["interpolation_scale"] = network.interpolation_scale
            want.setdefault("interpolation_scale", max(required.data["resolution"] // 64, 1))
    other = [
        f"model.{key}={_format_value(value)} for {_format_value(want.get(key))}" for key, value in have.items() if value != want.get(key)
    ]
    if other:
        raise ValueError(f"init_from={name!r} does not fit: {', '.join(other)}, which no tensor's shape shows. {remedy}")


def _format_value(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
