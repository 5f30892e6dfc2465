"""Every mistake of a recipe and not the first: what training would try is tried, and what goes wrong is noted.

Nothing is written, and no checkpoint is hashed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..checkpoint.store import CheckpointManager, find_checkpoint, resolve_checkpoint, select_checkpoint
from ..config.flow import FlowConfig
from ..config.objective import TrainingObjective
from ..config.schema import Config
from ..training.optimizer import check_ramp
from ..training.resume_rules import find_differences, resume_config

T = TypeVar("T")


class Mistakes(list[str]):
    """One line each, each once."""

    def add(self, text: str) -> None:
        """Add a mistake to the list."""
        text = " ".join(text.split())
        if text not in self:
            self.append(text)

    def attempt(self, act: Callable[..., T], *arguments: Any) -> T | None:
        """What a function gives, or None and one mistake more."""
        try:
            return act(*arguments)
        except (ValueError, OSError) as error:
            self.add(str(error))
            return None

    def build_with_defaults(
        self, make: Callable[..., T], values: Mapping[str, Any], section: str, defaults: Mapping[str, Any]
    ) -> tuple[T | None, dict[str, Any]]:
        """What a function makes of a section's values; each that it refuses is noted, and its default tried in its place.

        Args:
            make: a dataclass, or any function with a ValueError that calls its arguments `section.name`.
            values: by name.
            section: of the recipe.
            defaults: of the values that a recipe may give.

        Returns:
            That, or None where defaults do not help; and the values it was made of.
        """
        values = dict(values)
        while True:
            try:
                return make(**values), values
            except ValueError as error:
                self.add(str(error))
                named = re.findall(rf"\b{section}\.(\w+)", str(error))
                name = next((name for name in named if name in defaults and values.get(name) != defaults[name]), None)
                if name is None:
                    return None, values
                values[name] = defaults[name]


def defaults_of(section: Any) -> dict[str, Any]:
    """The defaults of a dataclass's fields, by name."""
    made = {item.name: item.default_factory() for item in fields(section) if item.default_factory is not MISSING}
    return {item.name: item.default for item in fields(section) if item.default is not MISSING} | made


def objective_of(config: Config, shape: tuple[int, ...], text: bool, mistakes: Mistakes) -> TrainingObjective:
    """The flow of a recipe, with defaults where it cannot be right."""

    def make(**values: Any) -> TrainingObjective:
        return TrainingObjective(FlowConfig(**values), shape, config.train.batch_size)

    objective = mistakes.build_with_defaults(make, vars(config.flow), "flow", defaults_of(FlowConfig))[0] or make()
    mistakes.attempt(objective.check_gradient_checkpointing, config.model.gradient_checkpointing)
    if text:
        mistakes.attempt(objective.check_text_conditioning)
    return objective


def check_coupling(objective: TrainingObjective, micro_batch: int, mistakes: Mistakes) -> None:
    """Whether the groups of a coupling divide a micro-batch."""
    if objective.flow.coupling != "independent" and micro_batch % objective.flow.coupling_group:
        images = torch.zeros(micro_batch, 1)
        mistakes.attempt(objective.couple_noise, images, images, images[:, 0])


def check_start_weights(config: Config, mistakes: Mistakes) -> None:
    """Whether a fresh run has one beginning, and adapters something to stand beside."""
    mistakes.attempt(check_ramp, config.train)
    init, start = config.init_from, config.checkpoint.start_from
    if init and start:
        mistakes.add(f"init_from={init!r} and checkpoint.start_from={start!r}: give one of them.")
    if config.train.lora_rank and not init and not start:
        mistakes.add("train.lora_rank without weights to add to: give init_from, or checkpoint.start_from.")
    if start and not _checkpoints(Path(start)):
        mistakes.attempt(find_checkpoint, Path(start))


def check_folder(config: Config, facts: Mapping[str, Any], mistakes: Mistakes) -> str:
    """Whether the run's folder can be written, and what it holds goes on with this recipe.

    Args:
        config: of the run.
        facts: on which a checkpoint must agree, as far as they are known.
        mistakes: to add to.

    Returns:
        How the run would begin.
    """
    folder = Path(config.output_dir)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        mistakes.add(f"output_dir={config.output_dir!r} cannot be written ({there} is {'read-only' if there.is_dir() else 'no folder'}).")
    resume = config.checkpoint.resume
    if resume == "none":
        mistakes.attempt(select_checkpoint, CheckpointManager(folder, 1), resume)
    found = _checkpoints(folder if resume in ("latest", "none") else resolve_checkpoint(folder, resume))
    if not found:
        if resume not in ("latest", "none"):
            mistakes.add(f"checkpoint.resume={resume!r} is no whole checkpoint: give a folder checkpoint-<step>, or `latest`.")
        return "starts afresh"
    state = mistakes.attempt(_state, found[0])
    known = {key: state["facts"][key] for key in facts if key in state["facts"]} if state else {}
    differences = find_differences(known, dict(facts)) if state else []
    if state and not differences:
        mistakes.attempt(resume_config, config, state)
    if differences:
        mistakes.add(f"{found[0]} is of another run: {'; '.join(differences)}. Give another --output_dir, or that run's settings.")
    return f"goes on from {found[0]}"


def _checkpoints(folder: Path) -> list[Path]:
    """Folders with a manifest: one that is a checkpoint, or those of a run, the newest first."""
    places = [folder] if (folder / "state.json").exists() else CheckpointManager(folder, 1).folders()
    return [place for place in places if (place / "manifest.json").is_file()]


def _state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        state["facts"], state["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/state.json cannot be read ({type(error).__name__}: {error}); it would be passed over.") from error
    return state
