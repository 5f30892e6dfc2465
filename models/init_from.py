"""Training that starts from published weights: what recipe they need, and how they come into a network of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .common.spec import FROM_DATA, CheckpointForm, NetworkSpec, PublishedWeights, StockForm
from .convert import from_stock, stock_classes, stock_form_of
from .published import ORIGINAL, build_stock, check_tensors, load_published
from .registry import NETWORKS, find_spec, spec_of

CLASS_TABLES = ("classes.weight", "class_embedding.weight")
OPTIONAL_PREFIXES = ("sizes.", "net.add_embedding.")
"""What a network may have beyond the published one: it begins without a say."""
DATA = {
    "channels": "channels of an image",
    "text_width": "of a token of data.text_encoder",
    "pooled_width": "of its pooled text",
}
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
    more: str = ""
    """What the recipe has to say besides, where they do not."""

    def __str__(self) -> str:
        said = " ".join(f"model.{name}={_format_value(value)}" for name, value in self.model.items())
        return f"{said} {self.more}".rstrip()


class InitReport(NamedTuple):
    """What became of published weights."""

    required: RecipeRequirements
    tensors: int
    """So many of the network's were taken."""
    notes: tuple[str, ...]
    """What was not taken as it is, one line each."""


def init_from_published(name: str, network: nn.Module, factor: float | None = None) -> InitReport:
    """Begin a network with published weights.

    A class table of other classes begins afresh, but for its null row; learned
    variances are left out; micro-conditions that the weights do not know begin
    without a say. Everything else must fit.

    Args:
        name: as of `load_published`.
        network: of the kind that the weights are of, with values, not sharded yet.
        factor: on the output layer; None for -1 where the weights predict a flow's velocity, which in diffusers
            points from data to noise, and 1 elsewhere. Checkpoints of the original SiT point as ours do.

    Raises:
        ValueError: weights that do not fit, with all that is missing, unexpected or
            misshapen, and the fields of the recipe with which they would.
    """
    found = load_published(name)
    required, own_spec = requirements_of(found), find_spec(network)
    kind = own_spec.kind if own_spec else type(network).__name__
    remedy = f"They fit with {required}; {', '.join(f'{value} {DATA[key]}' for key, value in required.data.items() if key in DATA)}."
    if kind != required.model["kind"]:
        raise ValueError(f"init_from={name!r} holds a {found.kind}, which is no model.kind={kind}. {remedy}")
    state, notes = _convert_tensors(found, required, network, factor)
    if found.variant:
        notes.append(f"the full weights are not there, and those of the variant {found.variant} are taken")
    checkpoint = NETWORKS[kind].checkpoint
    if not required.flow and checkpoint:
        notes.append(checkpoint.assumed(network))
    own = network.state_dict()
    state, more = _fit_class_tables(state, own)
    fresh = sorted(key for key in own.keys() - state.keys() if key.startswith(OPTIONAL_PREFIXES))
    if fresh:
        more.append(f"the weights know no micro-conditions: {len(fresh)} tensors begin afresh, without a say")
    check_tensors(
        name, f"this model.kind={kind}", state | {key: own[key] for key in fresh}, {key: v.shape for key, v in own.items()}, remedy
    )
    _check_options(found, required, network, remedy)
    if network.resolution != required.data["resolution"]:
        more.append(f"the weights were trained at a resolution of {required.data['resolution']}, which is {network.resolution} here")
    network.load_state_dict(state, strict=False)
    return InitReport(required, len(state), (*notes, *more))


def requirements_of(found: PublishedWeights) -> RecipeRequirements:
    """Return the recipe that published weights need.

    Raises:
        ValueError: weights that no network of ours can hold.
    """
    if found.kind == ORIGINAL:
        spec, checkpoint = _checkpoint_form(found)
        flow = checkpoint.flows.get(checkpoint.origin(found.arguments))
        return _build_requirements(spec.kind, checkpoint.options(found), flow, "" if flow else checkpoint.unknown)
    spec, form = _stock_form(found)
    return _build_requirements(spec.kind, form.options(found), _trained_flow(found, form))


def _checkpoint_form(found: PublishedWeights) -> tuple[NetworkSpec, CheckpointForm]:
    """Return whose network's an original checkpoint is, by the tensors it holds."""
    forms = [(spec, spec.checkpoint) for spec in NETWORKS.values() if spec.checkpoint]
    absent = {form.title: [key for key in form.tensors if key not in found.state] for _, form in forms}
    for spec, form in forms:
        if not absent[form.title]:
            return spec, form
    lacking = ", nor of ".join(f"{title}: it lacks {', '.join(keys)}" for title, keys in absent.items())
    raise ValueError(
        f"init_from={found.name!r} is no checkpoint of {lacking}. For weights of diffusers give the folder with their config.json."
    )


def _stock_form(found: PublishedWeights) -> tuple[NetworkSpec, StockForm]:
    held = stock_form_of(stock_classes()[found.kind])
    assert held, found.kind
    return held


def _build_requirements(kind: str, facts: dict[str, Any], flow: tuple[str, str] | None, more: str = "") -> RecipeRequirements:
    data: dict[str, int] = {key: facts.pop(key) for key in FROM_DATA if key in facts}
    model = {"kind": kind, **{key: value for key, value in facts.items() if value is not None}}
    return RecipeRequirements(model, data, {"path": flow[0], "predict": flow[1]} if flow else {}, more)


def _trained_flow(found: PublishedWeights, form: StockForm) -> tuple[str, str]:
    """Return path and prediction, as the scheduler beside the weights says, or as is usual for the class."""
    facts = found.scheduler
    if facts.get("prediction_type") == "flow_prediction" or "FlowMatch" in str(facts.get("_class_name")):
        return "condot", "velocity"
    path, predict = form.classes[stock_classes()[found.kind]]
    return (
        PATH_OF_SCHEDULE.get(str(facts.get("beta_schedule")), path),
        PREDICTION_OF_TYPE.get(str(facts.get("prediction_type")), predict),
    )


def _convert_tensors(
    found: PublishedWeights, required: RecipeRequirements, network: nn.Module, factor: float | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the published tensors under our names, and what is to be said of them."""
    if found.kind == ORIGINAL:
        ours, variances = _checkpoint_form(found)[1].load(found, required.model, network)
    else:
        with torch.device("meta"):
            stock = build_stock(found.kind, found.config)
        stock.load_state_dict(found.state, assign=True)
        sign = -1.0 if required.flow["predict"] == "velocity" else 1.0
        ours = from_stock(stock, sign if factor is None else factor)
        twice = found.config.get("out_channels") == 2 * required.data["channels"]
        variances = twice and _stock_form(found)[1].predicts_variances
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


def _check_options(found: PublishedWeights, required: RecipeRequirements, network: nn.Module, remedy: str) -> None:
    """Raises ValueError for what no shape shows: heads, clocks, positions, details of the U-Net."""
    form = spec_of(network).stock
    have, want = form.hidden_options(network, required.model, required.data) if form else ({}, {})
    other = [
        f"model.{key}={_format_value(value)} for {_format_value(want.get(key))}" for key, value in have.items() if value != want.get(key)
    ]
    if other:
        raise ValueError(f"init_from={found.name!r} does not fit: {', '.join(other)}, which no tensor's shape shows. {remedy}")


def _format_value(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
