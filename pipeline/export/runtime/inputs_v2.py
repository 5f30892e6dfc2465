"""What a caller asks an exported pipeline for, as numbers and texts that can be drawn, or a ValueError before any work.

It travels with exported models, written into the file of their pipeline. Licence: Apache-2.0.
"""

import operator
from typing import Any

import torch

from .pipeline_condot_v1 import NO_CLASS

ONE_SIZE = ("DiTTransformer2DModel",)
"""Networks that know the positions of the usual image alone: of another, diffusers stretches them, and no training of ours did."""
OUTPUTS = ("pil", "np", "pt", "latent")


def whole(name: str, value: Any, least: int) -> int:
    """Return a whole number of Python's, numpy's or torch's as one of Python's.

    Raises:
        ValueError: 3.7, None, a text, True, or a number below `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name}={value!r}: give a whole number, at least {least}.")
    return number


def pair(name: str, value: Any, least: int) -> Any:
    """Return two whole numbers, a height and a width or a top and a left.

    Raises:
        ValueError: anything else.
    """
    if not hasattr(value, "__len__") or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name}={value!r}: give two whole numbers, as ({least}, {least}).")
    return tuple(whole(name, one, least) for one in value)


def generators(generator: Any, count: int) -> Any:
    """Return the generator of all noise, or the list of one an image.

    Raises:
        ValueError: something else, or more or fewer than images.
    """
    listed = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if any(not isinstance(one, torch.Generator) for one in listed) and generator is not None:
        raise ValueError(f"generator={generator!r}: give torch.Generator().manual_seed(0), or a list of as many as images.")
    if listed == [generator]:
        return generator
    if len(listed) != count:
        raise ValueError(f"{len(listed)} generators of {count} images: give one for all, or one for each.")
    return listed


def labels_of(class_labels: Any, names: Any) -> Any:
    """Return the number of each class that is asked for; names or numbers, one or several, as lists, tuples, arrays or tensors.

    Args:
        class_labels: what the caller gave; None for no class.
        names: of the classes, by number.

    Raises:
        ValueError: none at all, 3.7, or a class that the model does not have.
    """
    if class_labels is None:
        return [NO_CLASS]
    numbers = {name: number for number, name in names.items()}
    given = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
    given = list(given) if isinstance(given, (list, tuple, range)) else [given]
    known = f"has classes 0 to {len(names) - 1}, and {NO_CLASS} for none" if names else "has no classes"
    found = []
    for label in given:
        number = numbers.get(label) if isinstance(label, str) else whole("class_labels", label, 0)
        if number != NO_CLASS and number not in names:
            raise ValueError(f"class_labels={label!r}: the model {known}.")
        found.append(number)
    if not found:
        raise ValueError(f"class_labels={class_labels!r} is empty: the model {known}.")
    return found


def numbered_classes(pipe: Any) -> Any:
    """Return the classes that a network knows, by number, where nobody named them; none of a network on text."""
    config = pipe.network.config
    count = config.get("num_embeds_ada_norm") or config.get("num_classes") or (config.get("num_class_embeds") or 1) - 1
    return {} if pipe.encoders else {number: str(number) for number in range(count)}


def texts_of(name: str, value: Any) -> Any:
    """Return captions, one or several, as a list.

    Raises:
        ValueError: none at all, or something that is no text.
    """
    given = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []
    if not given or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name}={value!r}: give a text, or a list of at least one.")
    return given


def prompts_of(prompt: Any, negative_prompt: Any) -> Any:
    """Return captions and what each is led away from, two lists of one length.

    Raises:
        ValueError: what is no text, or more or fewer negative ones than captions.
    """
    prompts = texts_of("prompt", prompt)
    away = texts_of("negative_prompt", "" if negative_prompt is None else negative_prompt)
    if isinstance(negative_prompt, str) or negative_prompt is None:
        away = away * len(prompts)
    if len(away) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(away)} negative prompts: give one, or one for each prompt.")
    return prompts, away


def unit_of(network: Any, factor: int) -> int:
    """Return of how many pixels an image's sides are multiples, each value of a sample being `factor` a side."""
    config = network.config
    return factor * int(config.get("patch_size") or 2 ** (len(config.get("block_out_channels", (0,))) - 1))


def largest_of(network: Any, factor: int) -> int:
    """Return up to how many pixels a side a network knows positions; 0 for any."""
    return factor * int(network.config.get("patch_size") or 1) * int(network.config.get("pos_embed_max_size") or 0)


def size_of(network: Any, factor: int, height: Any, width: Any) -> Any:
    """Return height and width of a sample, of which a pixel's side is `factor` times as fine.

    Args:
        network: whose `sample_size` is the usual one.
        factor: pixels a side of one value of a sample.
        height, width: pixels, or None for the usual ones.

    Raises:
        ValueError: what the network does not divide, or where its positions were not trained.
    """
    usual, unit, largest = network.config.sample_size, unit_of(network, factor), largest_of(network, factor)
    usual = [usual, usual] if isinstance(usual, int) else list(usual)
    sides = [
        factor * side if given is None else whole(name, given, 1)
        for name, given, side in zip(("height", "width"), (height, width), usual, strict=True)
    ]
    said = f"height={height}, width={width}"
    if any(side % unit for side in sides):
        raise ValueError(f"{said}: give multiples of {unit} pixels; the usual image is {factor * usual[0]} x {factor * usual[1]}.")
    found = [side // factor for side in sides]
    if found != usual and type(network).__name__ in ONE_SIZE:
        raise ValueError(
            f"{said}: this network's positions are of {factor * usual[0]} x {factor * usual[1]} alone. Leave the sizes out, "
            f"or take a model that was trained with data.aspect_ratios."
        )
    if largest and max(sides) > largest:
        raise ValueError(f"{said}: the network's positions go up to {largest} pixels a side.")
    return found


def sizes_of(original_size: Any, crop: Any, pixels: Any) -> torch.Tensor:
    """Return what a network that is told sizes is told, (1, 6), pixels: of the original, the crop's top and left, of the image.

    Raises:
        ValueError: sizes that are none; None for the original's is the image's own.
    """
    original = pixels if original_size is None else pair("original_size", original_size, 1)
    return torch.tensor([[*original, *pair("crop", crop, 0), *pixels]], dtype=torch.float32)


def check_latents(latents: Any, shape: Any) -> None:
    """Raise ValueError for noise of another shape than the samples', (B, C, h, w), or that is no tensor of numbers with a point."""
    found = tuple(getattr(latents, "shape", ()))
    if latents is not None and not (torch.is_tensor(latents) and latents.is_floating_point() and found == shape):
        raise ValueError(f"latents of shape {found} and kind {getattr(latents, 'dtype', type(latents).__name__)}: give noise of {shape}.")


def check_outputs(output_type: Any, callback: Any, names: Any) -> Any:
    """Return the names of the tensors that a callback is to be given.

    Raises:
        ValueError: an unknown kind of output, what cannot be called, or other tensors than the latents.
    """
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type={output_type!r} is unknown: choose one of {', '.join(OUTPUTS)}.")
    names = getattr(callback, "tensor_inputs", names)
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end={callback!r}: give a function of (pipe, number, timestep, tensors).")
    names = [names] if isinstance(names, str) else list(names or ())
    if any(name != "latents" for name in names):
        raise ValueError(f"callback_on_step_end_tensor_inputs={names}: there is ['latents'] alone.")
    return names
