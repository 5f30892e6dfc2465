"""What the house knows of a kind of network: its section of the recipe, its class, and the forms in which it travels.

Nothing outside a network's folder knows its name: building, conversion, LoRA, costs and published
weights ask the spec, which the table `models.registry.NETWORKS` holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from condot.core.model_config import ModelConfig

from .init import InitMethod

LoraTarget = Literal["attention", "feed_forward", "modulation"]
FROM_DATA = ("channels", "resolution", "num_classes", "text_width", "pooled_width")
"""Arguments of a constructor that the data decide; a network takes classes, or text."""
TrainedFlow = tuple[str, str]
"""`flow.path` and `flow.predict` that weights were trained with."""


class PublishedWeights(NamedTuple):
    """Published weights, on the CPU, in float32."""

    name: str
    kind: str
    """The name of a stock class, or `published.ORIGINAL`."""
    config: Mapping[str, Any]
    """Complete, of the stock class; empty for an original."""
    state: Mapping[str, Tensor]
    scheduler: Mapping[str, Any]
    """The configuration of the scheduler beside them; empty where there is none."""
    variant: str = ""
    """Such as fp16, where the full weights are not there."""
    arguments: Any = None
    """The training arguments that an original holds."""


class HiddenOptions(NamedTuple):
    """Options that no tensor's shape shows."""

    have: dict[str, Any]
    """As the network has them."""
    want: dict[str, Any]
    """As the weights want them; fields that `have` does not name are not compared."""


@dataclass(frozen=True, kw_only=True)
class StockForm:
    """How a network becomes one of diffusers' stock classes, and back.

    `factor` is what the other side's output is multiplied by, on the output layer.
    """

    classes: Mapping[type[nn.Module], TrainedFlow]
    """The classes; with each, what its weights were trained with where no scheduler says."""
    to_stock: Callable[[Any, float, bool], nn.Module]
    """From network, factor and whether captions are masked."""
    from_stock: Callable[[Any, float, int | None, int], nn.Module]
    """From stock network, factor, classes (None for all) and width of pooled text (where not used)."""
    unsupported: Callable[[Any, bool, bool], str]
    """Why no stock class holds a network, given whether captions are masked and images bucketed; "" where one does."""
    options: Callable[[PublishedWeights], dict[str, Any]]
    """The constructor's arguments that stock weights decide; None for a default."""
    hidden_options: Callable[[Any, Mapping[str, Any], Mapping[str, int]], HiddenOptions]
    """From network, and what weights ask of the sections `model` and of the data."""
    legacy_norm: str = ""
    """`norm_type` by which Transformer2DModel, as diffusers called it once, is of the first class."""
    predicts_variances: bool = False
    """Published weights may have twice the channels out; the second half is left out."""
    fixed_size: bool = False
    """The stock class would stretch positions over images of another size, and training did not."""


@dataclass(frozen=True, kw_only=True)
class CustomForm:
    """The class of a network that travels with its code, where no stock class holds it.

    The class is in a file of its own, which holds the network as `network`. Whoever changes what it
    computes, or how its weights are called, gives the file and its folder's entry a new version:
    two exports of one process share the file's name.
    """

    cls: type[nn.Module]
    config: Callable[[Any], dict[str, Any]]
    """The arguments of `cls` for a network."""
    output_layer: str = "leave"
    """The linear map that takes the factor."""


@dataclass(frozen=True, kw_only=True)
class CheckpointForm:
    """A file of weights as the authors' own code writes it, without a configuration beside it."""

    title: str
    """Whose, for errors: `DiT or SiT`."""
    tensors: tuple[str, ...]
    """Names by which the file is known."""
    origin: Callable[[Any], str]
    """Which of the authors', by the training arguments in the file; "" where they do not say."""
    options: Callable[[PublishedWeights], dict[str, Any]]
    """As of `StockForm`; None too for what the file does not say."""
    load: Callable[[PublishedWeights, Mapping[str, Any], Any], tuple[nn.Module, bool]]
    """From weights, the options they decide and the network to begin: ours with the weights, and whether variances were left out."""
    flows: Mapping[str, TrainedFlow] = field(default_factory=dict)
    """By origin."""
    unknown: str = ""
    """What a recipe has to say beside the options where the origin is unknown."""
    assumed: Callable[[Any], str] = lambda network: ""
    """What is taken for granted then, of the network."""


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """A kind of network.

    Args:
        config: the section `model` of a recipe; `kind` is its default's.
        network: `forward(x, t, condition, sizes=None)`, see `models.registry`, with attributes `channels`, `resolution`,
            `num_classes` (0 on text), `conditioning` (`class` or `text`), `micro_conditions` and `size_multiple`, of which
            the sides of an image are multiples; its constructor takes the section's fields, channels, resolution, and
            num_classes or text_width and pooled_width.
        init_rule: how a parameter begins, by its name as in `named_parameters`.
        presets: by the name that a field `preset` of the section takes, the constructor's arguments it stands for; a field
            beside it wins where it is not None.
        styles: of a field `style` likewise; it wins over the preset.
        lora_targets: the linear maps that adapters may stand beside, as patterns of their names. A map whose parts are
            joined has one adapter of the rank. None: the network takes no LoRA.
        tiny: constructor's arguments of a network of some thousand weights; every kind's tests are run with it.
        tabulated: titles and arguments of the networks whose activations `python -m models.cost` tabulates.
        is_stage: which of the network's named blocks compute activations one after another; not a list of embeddings.
        stock, custom, checkpoint: its forms elsewhere; None where there are none. Without the first two it is not exported.
    """

    config: type[ModelConfig]
    network: type[nn.Module]
    init_rule: Callable[[str], InitMethod]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    styles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lora_targets: Mapping[LoraTarget, str] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tabulated: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    is_stage: Callable[[str], bool] = lambda name: True
    stock: StockForm | None = None
    custom: CustomForm | None = None
    checkpoint: CheckpointForm | None = None

    @property
    def kind(self) -> str:
        """The name in `model.kind`."""
        return str(getattr(self.config, "kind", ""))

    def resolve_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor's arguments: what preset and style say, then the options that are not None.

        Args:
            options: of the recipe's section, and what the data say; as they are where there are no presets.

        Raises:
            ValueError: an unknown preset or style, with the known ones.
        """
        if not self.presets:
            return dict(options)
        chosen = {name: value for name, value in options.items() if value is not None}
        said = dict(self._pop("preset", self.presets, chosen, ", or give width, depth and heads beside one"))
        if self.styles:
            said |= self._pop("style", self.styles, chosen)
        return said | chosen

    def _pop(self, name: str, table: Mapping[str, Mapping[str, Any]], chosen: dict[str, Any], remedy: str = "") -> Mapping[str, Any]:
        """Take a shorthand out of the options and return what it stands for."""
        value = chosen.pop(name, getattr(self.config, name))
        if value not in table:
            raise ValueError(f"model.{name}={value!r} is unknown: choose one of {', '.join(table)}{remedy}.")
        return table[value]

    def check(self) -> None:
        """Raises ValueError where section and constructor do not know the same options."""
        if not issubclass(self.config, ModelConfig) or not hasattr(self.config, "__dataclass_fields__"):
            raise ValueError(f"{self.config.__name__} is no section `model`: derive a dataclass from core.model_config.ModelConfig.")
        section: Any = self.config
        given = {item.name: getattr(section(), item.name) for item in fields(section) if item.name != "kind"}
        taken = inspect.signature(self.network.__init__).parameters
        free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        unknown = [] if free else [name for name in self.resolve_options(given) if name not in taken]
        if unknown:
            raise ValueError(
                f"model.kind={self.kind}: {self.network.__name__} takes no {', '.join(unknown)}, of which {section.__name__} has "
                f"fields: give its constructor such arguments, or leave the fields out."
            )
