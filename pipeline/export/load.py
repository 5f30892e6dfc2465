"""A pipeline folder read back as a field, for our own solvers: its parts are loaded one by one, so no code of the folder runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from condot.core.model_folders import MOST_COUNT, TEXT_MODELS, check_counts, check_model_folder, check_size, read_json, read_shapes
from condot.core.plugins import explain_missing
from condot.core.printable import one_line
from condot.core.registry import UnknownKindError
from condot.core.safe_yaml import read_yaml

from ..config.flow import FlowConfig
from ..config.objective import build_predictor
from ..config.parse import config_from_mapping
from ..config.schema import Config
from ..evaluation.provenance import recorded_plugins
from ..flow import Condition, velocity_field
from ..hub.checksums import check_checksums
from ..sampling.flow_model import FlowModel
from ..training.best_effort import is_out_of_memory
from .runtime.captions_v1 import Captions
from .runtime.inputs_v2 import ONE_SIZE, largest_of, unit_of
from .runtime.pipeline_condot_v1 import NO_CLASS
from .runtime.pipeline_condot_v2 import CondotPipeline
from .runtime.scheduling_flow_ode_v2 import FlowODEScheduler
from .runtime.scheduling_flow_sde_v2 import FlowSDEScheduler
from .scheduler_map import export_form, read_path_and_prediction

NETWORK_CLASSES = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DModel", "UNet2DConditionModel")
"""Stock networks that are known here."""
MORE_TEXT_ENCODER_CLASSES = ("CLIPTextModelWithProjection", "T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel")
"""Beside the classes of `TEXT_MODELS`."""
AUTOENCODER_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
OWN_SCHEDULERS = {kind.__name__: kind for kind in (FlowODEScheduler, FlowSDEScheduler)}
"""Of ours; the second version reads the first one's configurations."""
STOCK_SCHEDULERS = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "IPNDMScheduler"),
    *(
        "UniPCMultistepScheduler",
        "SASolverScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
    ),
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
)
"""Those of diffusers, so that a folder has none of its other functions and classes called."""
TEXT_COMPONENTS = tuple(f"{part}{end}" for end in ("", "_2", "_3") for part in ("tokenizer", "text_encoder"))


def load_flow_model(folder: str | Path, device: torch.device | str = "cpu", own_classes: Mapping[str, type] | None = None) -> FlowModel:
    """A pipeline folder, such as `write.export_pipeline` makes, as a velocity field.

    Args:
        folder: a local folder.
        device: to compute on.
        own_classes: networks of ours by the names of their classes.

    Raises:
        ValueError: no such folder, a damaged or changed one, or one of another kind of model.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"pipeline={str(folder)!r} is no pipeline folder (no model_index.json): "
            f"export one with `condot export --run RUN --output FOLDER`."
        )
    check_checksums(folder)
    try:
        check_model_folder(folder)
        pipeline = _load_pipeline(folder, read_model_index(folder), own_classes or {})
        recipe = folder / "config.yaml"
        with explain_missing(recorded_plugins(folder)):
            config = config_from_mapping(Config, read_yaml(recipe)) if recipe.exists() else None
    except UnknownKindError as error:
        raise ValueError(f"pipeline={str(folder)!r}: {error}") from error
    except Exception as error:  # diffusers raises many kinds for a damaged folder; each is the user's folder
        raise ValueError(
            f"pipeline={str(folder)!r} cannot be loaded ({type(error).__name__}: {one_line(error)[:600]}): export it again."
        ) from error
    with _report_mismatch(folder):
        model = flow_model_from_pipeline(pipeline.to(device), config.flow if config else None)
    report = _report_mismatch(folder)
    model = replace(
        model, field=report(model.field), decode=report(model.decode), encode_text=report(model.encode_text) if model.encode_text else None
    )
    return replace(model, bit_depth=config.data.bit_depth) if config else model


@contextlib.contextmanager
def _report_mismatch(folder: Path) -> Iterator[None]:
    """Have what parts end in that do not fit one another, or draw nothing, be said as a ValueError of one line that names the folder."""
    try:
        yield
    except (AttributeError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"pipeline={str(folder)!r}: its parts do not fit ({one_line(error)[:300]}): export it again.") from error


def read_model_index(folder: Path) -> dict[str, Any]:
    """Return a pipeline's model_index.json.

    Raises:
        ValueError: it cannot be read, or its parts or class names are none.
    """
    index = read_json(folder / "model_index.json")
    for name, made in index.items():
        pair = isinstance(made, list) and len(made) == 2 and all(part is None or isinstance(part, str) for part in made)
        if name != "id2label" and isinstance(made, list) and not pair:
            raise ValueError(f"{folder / 'model_index.json'}: its {name} names no class: export it again.")
    names = index.get("id2label")
    fits = isinstance(names, dict) and all(key.isdecimal() and len(key) < 7 and isinstance(value, str) for key, value in names.items())
    if names is not None and not fits:
        raise ValueError(f"{folder / 'model_index.json'}: its id2label is no list of names by number: export it again.")
    return index


def _load_pipeline(folder: Path, index: dict[str, Any], own_classes: Mapping[str, type]) -> CondotPipeline:
    """Our pipeline around the folder's parts."""
    parts: dict[str, Any] = {}
    for name, made in index.items():
        if not isinstance(made, list) or name.startswith("_") or made[1] is None:
            continue
        if name in ("transformer", "unet"):
            parts[name] = _load_component(folder / name, made[1], NETWORK_CLASSES, own_classes)
        elif name == "vae":
            parts[name] = _load_component(folder / name, made[1], AUTOENCODER_CLASSES, {})
        elif name == "scheduler":
            parts[name] = _load_scheduler(folder / name, made[1])
        elif name in TEXT_COMPONENTS:
            parts[name] = _load_text_component(folder / name, made[1])
        else:
            raise ValueError(f"it has a {name}, a {made[1]}, which is not known here: sample it with diffusers")
    return CondotPipeline(**parts, id2label=index.get("id2label"), padding=index.get("padding", ""))


def _load_scheduler(folder: Path, kind: str) -> Any:
    """Return a scheduler, of a class of ours or of one that is known; of no more than its numbers make of it."""
    if kind not in (*OWN_SCHEDULERS, *STOCK_SCHEDULERS):
        raise ValueError(f"its scheduler is a {kind}, known are {', '.join((*OWN_SCHEDULERS, *STOCK_SCHEDULERS))}")
    path = folder / "scheduler_config.json"
    check_counts(path, read_json(path), MOST_COUNT)
    found: Any = OWN_SCHEDULERS.get(kind) or getattr(diffusers, kind)
    return found.from_pretrained(folder, local_files_only=True)


def _load_text_component(folder: Path, kind: str) -> Any:
    """Return a text encoder or a tokenizer of transformers, of the kinds that build themselves of their own files alone."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found: Any = getattr(transformers, kind, None)
    load_options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if folder.name.startswith("tokenizer"):
        base = transformers.PreTrainedTokenizerBase
        if not (isinstance(found, type) and issubclass(found, base) and "Tokenizer" in kind):
            raise ValueError(f"its {folder.name} is a {kind}, which is no tokenizer of transformers")
        return found.from_pretrained(folder, **load_options)
    known = {MODEL_MAPPING_NAMES.get(name) for name in TEXT_MODELS} | set(MORE_TEXT_ENCODER_CLASSES)
    if kind not in known or found is None:
        raise ValueError(f"its {folder.name} is a {kind}, which is no text encoder that is known here")
    config, shapes = read_json(folder / "config.json"), read_shapes(sorted(folder.glob("*.safetensors")))
    if config.get("model_type") not in TEXT_MODELS:
        raise ValueError(f"its {folder.name} is of the type {config.get('model_type')!r}, known are {', '.join(TEXT_MODELS)}")
    check_counts(folder / "config.json", config, len(shapes))
    with torch.device("meta"):
        check_size(folder / "config.json", found(found.config_class.from_pretrained(folder, **load_options)), shapes)
    return found.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **load_options)


def _load_component(folder: Path, kind: str, classes: tuple[str, ...], own_classes: Mapping[str, type]) -> Any:
    """A component, of one of the known stock classes or of our own."""
    if kind not in (*classes, *own_classes):
        raise ValueError(f"its {folder.name} is a {kind}, known are {', '.join((*classes, *own_classes))}")
    found: Any = own_classes.get(kind) or getattr(diffusers, kind)
    config, shapes = read_json(folder / "config.json"), read_shapes(sorted(folder.glob("*.safetensors")))
    check_counts(folder / "config.json", config, len(shapes))
    with torch.device("meta"):
        check_size(folder / "config.json", found.from_config(config), shapes)
    return found.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()


def flow_model_from_pipeline(pipeline: CondotPipeline, flow: FlowConfig | None = None) -> FlowModel:
    """A pipeline's network as a velocity field.

    Args:
        pipeline: with all its parts, on its device.
        flow: the recipe they came with, if any.

    Raises:
        ValueError: a scheduler of another kind of model.
    """
    network = pipeline.network
    if flow is not None and flow.objective == "joint":  # both halves are its own, times the factor that the first was exported with
        path, kind, sign, kept = flow.build_path(), flow.predict, 1 / export_form(flow).factor, 2 * network.config.in_channels
    else:
        path, kind = read_path_and_prediction(pipeline.scheduler, flow)
        sign, kept = -1.0 if pipeline.trained[0] == "flow_prediction" else 1.0, network.config.in_channels
    side, factor, text = network.config.sample_size, pipeline.factor, bool(pipeline.encoders)

    def predict(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        conditioning, size = Captions(*condition) if text else condition, [factor * length for length in x.shape[2:]]
        pixels = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=network.device)
        out = pipeline.outputs(x.to(network.dtype), 1000 * (1 - t), conditioning, pixels.expand(len(x), 6))
        return sign * out[:, :kept].to(x.dtype)  # published networks give variances behind

    names = pipeline.config.id2label
    image_channels = network.config.in_channels if pipeline.vae is None else pipeline.vae.config.in_channels
    return FlowModel(
        field=velocity_field(build_predictor(predict, flow) if flow else predict, path, kind),
        path=path,
        shape=(network.config.in_channels, side, side),
        num_classes=0 if text else NO_CLASS if names is None and type(network).__name__ == "DiTTransformer2DModel" else len(names or ()),
        null=pipeline.encode_prompt([""]) if text else NO_CLASS,
        device=network.device,
        decode=pipeline.decode,
        predict=kind,
        pixels=() if factor == 1 else (image_channels, factor * side, factor * side),
        encode_text=pipeline.encode_prompt if text else None,
        side_multiple=unit_of(network, factor),
        one_size=type(network).__name__ in ONE_SIZE,
        max_side=largest_of(network, factor),
    )
