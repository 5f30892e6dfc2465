"""Frozen encoders without their weights, on the meta device: to be counted, not to be used."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from .autoencoder import AutoencoderFacts
from .fingerprint import read_config, resolve_encoder
from .text import read_text_config
from .text_states import TextFacts


def meta_autoencoder(facts: AutoencoderFacts) -> nn.Module:
    """An autoencoder of these facts; TAEF2's pools, which diffusers lacks, are left out.

    Raises:
        ValueError: a configuration that makes none.
    """
    import diffusers

    folder = resolve_encoder(facts.name, "data.autoencoder", "vae")
    kind = getattr(diffusers, facts.fingerprint["class"].split()[0])
    known = inspect.signature(kind.__init__).parameters
    try:
        with torch.device("meta"):
            network: nn.Module = kind(**{key: value for key, value in read_config(folder).items() if key in known})
    except Exception as error:  # whatever a stranger may have written there
        raise ValueError(f"{folder}/config.json makes no autoencoder ({error}): copy it again.") from error
    return network.eval().requires_grad_(False)


def meta_text_encoder(facts: TextFacts) -> nn.Module:
    """A text encoder of these facts: of T5 the encoder alone, of a CLIP its text half.

    Raises:
        ValueError: a configuration that makes none.
    """
    import transformers

    folder = resolve_encoder(facts.name, "data.text_encoder", "text_encoder")
    config = read_text_config(folder)
    kinds = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
    try:
        with torch.device("meta"):
            if facts.kind == "clip":
                network: nn.Module = transformers.CLIPTextModel(config.get_text_config())
            elif config.model_type in kinds:
                network = getattr(transformers, kinds[config.model_type])(config)
            else:
                network = transformers.AutoModel.from_config(config)
    except Exception as error:  # whatever a stranger may have written there
        raise ValueError(f"{folder}/config.json makes no text encoder ({error}): copy it again.") from error
    return network.eval().requires_grad_(False)
