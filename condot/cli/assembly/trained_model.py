"""A checkpoint of a run, read back: the network with the weights that are asked for, its text encoders, its export."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from condot.core.plugins import explain_missing
from condot.data.encoders.autoencoder import Autoencoder
from condot.data.encoders.text import read_text_encoders
from condot.data.loader.text_conditioner import TextConditioner
from condot.models import registry
from condot.models.convert import has_fixed_size, to_diffusers, unsupported_by_stock
from condot.models.lora import add_lora, merge_lora
from condot.pipeline.checkpoint.store import CheckpointManager, check_network, explain_errors, load_state
from condot.pipeline.config.model import build_model_kwargs
from condot.pipeline.config.parse import config_from_mapping
from condot.pipeline.config.schema import Config
from condot.pipeline.ema.weight_selection import load_selected_weights, parse_weight_selection
from condot.pipeline.evaluation.provenance import Provenance, hash_tensors
from condot.pipeline.export.model_card import CardFacts
from condot.pipeline.export.scheduler_map import export_form
from condot.pipeline.export.write import export_pipeline
from condot.pipeline.latent_space import LatentSpace
from condot.pipeline.sampling.flow_model import FlowModel, build_flow_model
from condot.pipeline.sampling.options import ExportOptions
from condot.pipeline.training.resume_rules import saved_journal


class TrainedModel:
    """A checkpoint of a run, read back.

    Args:
        run: the run's folder, or one checkpoint of it.
        checkpoint: of the run; by default its newest.
        ema: which weights, as in `pipeline.ema.weight_selection.parse_weight_selection`; by default the first average.
        option: how messages call `ema`.

    Raises:
        ValueError: no whole checkpoint there, or no such weights.
    """

    def __init__(self, run: Path, checkpoint: Path | None = None, ema: str = "", option: str = "--ema") -> None:
        found = checkpoint or (run if (run / "state.json").is_file() else CheckpointManager(run, keep=1).latest())
        if found is None:
            raise ValueError(f"run={str(run)!r} holds no whole checkpoint: train first, `condot train --output_dir {run}`.")
        self.run, self.checkpoint, self.state = run, found, load_state(found)
        with explain_errors(found), explain_missing(self.state.get("plugins")):
            self.config = config_from_mapping(Config, self.state["config"])
            wanted = parse_weight_selection(ema, self.config.ema, self.config.train.batch_size, option)
            self.ema, self.class_names = wanted.name, tuple(self.state["class_names"])
            self.space, self.text = LatentSpace.from_checkpoint(self.state["space"]), self.state["text"]
            text_widths = tuple(self.text["widths"]) if self.text else None
            sizes = build_model_kwargs(self.config.model, self.space.shape, len(self.class_names), text_widths, self.config.flow.objective)
            check_network(found, sizes, partial(registry.build, **sizes, device="meta"))
            self.network = registry.build(**sizes).eval()
            if self.config.train.lora_rank:
                add_lora(self.network, self.config.train.lora_rank, self.config.train.lora_alpha)
            weights, self.weights = load_selected_weights(found, self.state, wanted, self.config.ema)
            self.network.load_state_dict(weights)
            # taken before the merge, which rounds as its machine does
            self.lora_digest = hash_tensors(weights) if self.config.train.lora_rank else ""
            self.network = merge_lora(self.network)

    def provenance(self) -> Provenance:
        """Return which weights these are."""
        digest = self.lora_digest or hash_tensors(self.network.state_dict())
        return Provenance.from_run(digest, self.state["step"], self.ema, self.state.get("plugins"))

    def build_model(self, device: torch.device | str) -> FlowModel:
        """Return the network as a field to sample from."""
        space = self.space
        decode = space.decoder(partial(Autoencoder, space.autoencoder, device, expected=space.fingerprint))
        read = self.load_text_conditioner(device).read if self.text else None
        classes = 0 if self.text else len(self.class_names)
        network, data = self.network.to(device), self.config.data
        facts = (read, None, data.bit_depth, has_fixed_size(network, bool(data.aspect_ratios)))
        return build_flow_model(network, self.config.flow, space.shape, classes, decode, space.pixels, *facts)

    def load_text_conditioner(self, device: torch.device | str) -> TextConditioner:
        """Return the text encoders that the run was trained with.

        Raises:
            ValueError: they are not there any more, or are others.
        """
        conditioner = TextConditioner(read_text_encoders(self.config.data), device)
        conditioner.check(self.text["fingerprints"])
        return conditioner

    def export(self, output: Path, options: ExportOptions) -> Path:
        """Write the folder that stock diffusers loads, and return it."""
        card_facts: dict[str, Any] = {"title": options.title, "license": options.license, "datasets": options.dataset}
        card_facts |= {"weights": self.weights, "changes": saved_journal(self.state)}
        card_facts |= {"output": output, "repository": options.push_to_hub}
        trained, space, form = self.provenance(), self.space, export_form(self.config.flow)
        text_encoders = self.load_text_conditioner("cpu").networks if self.text else ()
        how = (bool(text_encoders) and self.config.data.text_padding == "mask", bool(self.config.data.aspect_ratios))
        network = to_diffusers(self.network, form.factor, *how)
        why_not_stock = unsupported_by_stock(self.network, *how)
        card_facts["provenance"] = replace(trained, sha256=hash_tensors(network.state_dict()))
        card = CardFacts.from_run(self.run, self.state["images"], self.state["step"], self.network, **card_facts)
        vae = Autoencoder(space.autoencoder, expected=space.fingerprint).model if space.is_latent else None
        about: dict[str, Any] = {
            "why_not_stock": why_not_stock,
            "text_encoders": text_encoders,
            "captions": self.text.get("captions", ()),
            "variant": options.variant,
        }
        class_names = () if self.text else self.class_names
        return export_pipeline(output, network, self.config, class_names, card, space, vae, **about)
