"""What Accelerate's launcher says by environment variables, held against the recipe.

One of them would win without a word: Accelerate reads some variables before,
some after what the program asks for. So what contradicts is refused, both
named. What the launcher says when nobody told it anything (`no` precision, no
compilation) says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from ..config.schema import Config

Sharding = Literal["none", "full", "hybrid"]
STRATEGIES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}
SHARDINGS: dict[str, Sharding] = {"FULL_SHARD": "full", "HYBRID_SHARD": "hybrid"}
_noted: Sharding | None = None


def sharding(config: Config) -> Sharding:
    """How weights, gradients, moments and averages lie on the ranks: as the recipe says, else as launched, else `none`."""
    return config.train.sharding or _said_sharding(os.environ) or _noted or "none"


def take_over() -> None:
    """Remember what the launcher said of sharding and compilation, and unsay it.

    We do both ourselves; Accelerate would do them again, and transformers,
    where it reads of FSDP, leaves the weights of frozen encoders out on every
    rank but one.
    """
    global _noted
    _noted = _said_sharding(os.environ)
    for name in list(os.environ):
        if name.startswith(("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_DYNAMO_")) or name in (
            "ACCELERATE_USE_FSDP",
            "ACCELERATE_USE_PARALLELISM_CONFIG",
        ):
            del os.environ[name]


def check_recipe(config: Config) -> None:
    """Raises ValueError for a launcher that contradicts the recipe, with all that does."""
    found = contradictions(config, os.environ)
    if found:
        raise ValueError("; ".join(found))


def contradictions(config: Config, said: Mapping[str, str]) -> list[str]:
    """What the launcher's variables say against the recipe, each with its remedy."""
    found = []
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if _true(said, f"ACCELERATE_USE_{engine}"):
            found.append(f"ACCELERATE_USE_{engine}=true: condot trains by DDP or FSDP2 only; take configs/accelerate/fsdp2.yaml")
    precision, asked = said.get("ACCELERATE_MIXED_PRECISION", "no"), config.train.mixed_precision
    if precision != "no" and asked not in (None, "auto", precision):
        found.append(
            f"ACCELERATE_MIXED_PRECISION={precision} and train.mixed_precision={asked}: "
            f"leave one out, or say the same in the launcher's config and in the recipe"
        )
    backend = said.get("ACCELERATE_FP8_BACKEND", "AO").upper()
    if "fp8" in (precision, asked) and backend not in ("AO", "NO"):
        found.append(f"ACCELERATE_FP8_BACKEND={backend}: condot's fp8 is torchao's; use --fp8_backend ao")
    passes = said.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if passes is not None and passes != str(config.train.gradient_accumulation_steps):
        found.append(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={passes} and "
            f"train.gradient_accumulation_steps={config.train.gradient_accumulation_steps}: leave it to the recipe"
        )
    compiler = said.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    if compiler != "NO" and not (compiler == "INDUCTOR" and config.train.compile):
        state = str(config.train.compile).lower()
        found.append(
            f"ACCELERATE_DYNAMO_BACKEND={compiler} and train.compile={state}: "
            f"launch with `dynamo_backend: no` and compile by --train.compile=true, block by block with inductor"
        )
    return found + (_against_sharding(config, said) if _true(said, "ACCELERATE_USE_FSDP") else [])


def _against_sharding(config: Config, said: Mapping[str, str]) -> list[str]:
    """Of the launcher's FSDP."""
    found = []
    version, strategy = said.get("FSDP_VERSION", "1"), _strategy(said)
    if version != "2":
        found.append(f"FSDP_VERSION={version}: condot shards by FSDP2; write `fsdp_version: 2` into the launcher's config")
    if strategy not in SHARDINGS:
        found.append(f"FSDP_SHARDING_STRATEGY={strategy}: FULL_SHARD or HYBRID_SHARD; without sharding launch with MULTI_GPU")
    told, asked = _said_sharding(said), config.train.sharding
    if asked == "none" or (asked == "full" and told == "hybrid"):
        found.append(f"ACCELERATE_USE_FSDP=true ({strategy}) and train.sharding={asked}: leave one out, or say the same in both")
    if said.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("true", "1", *map(str.lower, SHARDINGS)):
        found.append("FSDP_RESHARD_AFTER_FORWARD=false: condot gives gathered weights back after the forward pass; say true")
    if _true(said, "FSDP_OFFLOAD_PARAMS"):
        found.append("FSDP_OFFLOAD_PARAMS=true: condot keeps its shares on the device; say false")
    if _true(said, "FSDP_ACTIVATION_CHECKPOINTING") and not config.model.gradient_checkpointing:
        found.append("FSDP_ACTIVATION_CHECKPOINTING=true and model.gradient_checkpointing=false: say it in the recipe")
    for axis in ("TP", "CP", "SP"):
        size = said.get(f"PARALLELISM_CONFIG_{axis}_SIZE", "1")
        if size != "1":
            found.append(f"PARALLELISM_CONFIG_{axis}_SIZE={size}: condot splits batches and weights only; say 1")
    return found


def _said_sharding(said: Mapping[str, str]) -> Sharding | None:
    """What the launcher's FSDP comes to; None without it."""
    if not _true(said, "ACCELERATE_USE_FSDP"):
        return None
    replicas = said.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")
    return "hybrid" if replicas not in ("", "1") else SHARDINGS.get(_strategy(said), "full")


def _strategy(said: Mapping[str, str]) -> str:
    name = said.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    return STRATEGIES.get(name, name)


def _true(said: Mapping[str, str], name: str) -> bool:
    return said.get(name, "").lower() in ("true", "1", "yes", "y", "t", "on")
