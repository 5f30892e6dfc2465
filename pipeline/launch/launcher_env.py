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
FSDP1_STRATEGY_NAMES = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD", "5": "HYBRID_SHARD_ZERO2"}
SHARDING_OF_STRATEGY: dict[str, Sharding] = {"FULL_SHARD": "full", "HYBRID_SHARD": "hybrid"}
_launched_sharding: Sharding | None = None


def resolve_sharding(config: Config) -> Sharding:
    """How weights, gradients, moments and averages lie on the ranks: as the recipe says, else as launched, else `none`."""
    return config.train.sharding or _sharding_from_env(os.environ) or _launched_sharding or "none"


def consume_launcher_env() -> None:
    """Remember what the launcher said of sharding and compilation, and unsay it.

    We do both ourselves; Accelerate would do them again, and transformers,
    where it reads of FSDP, leaves the weights of frozen encoders out on every
    rank but one.
    """
    global _launched_sharding
    _launched_sharding = _sharding_from_env(os.environ)
    for name in list(os.environ):
        if name.startswith(("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_DYNAMO_")) or name in (
            "ACCELERATE_USE_FSDP",
            "ACCELERATE_USE_PARALLELISM_CONFIG",
        ):
            del os.environ[name]


def check_launcher_matches_recipe(config: Config) -> None:
    """Raises ValueError for a launcher that contradicts the recipe, with all that does."""
    conflicts = find_conflicts(config, os.environ)
    if conflicts:
        raise ValueError("; ".join(conflicts))


def find_conflicts(config: Config, env: Mapping[str, str]) -> list[str]:
    """What the launcher's variables say against the recipe, each with its remedy."""
    conflicts = []
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if _env_flag(env, f"ACCELERATE_USE_{engine}"):
            conflicts.append(f"ACCELERATE_USE_{engine}=true: condot trains by DDP or FSDP2 only; take configs/accelerate/fsdp2.yaml")
    precision, requested = env.get("ACCELERATE_MIXED_PRECISION", "no"), config.train.mixed_precision
    if precision != "no" and requested not in (None, "auto", precision):
        conflicts.append(
            f"ACCELERATE_MIXED_PRECISION={precision} and train.mixed_precision={requested}: "
            f"leave one out, or say the same in the launcher's config and in the recipe"
        )
    backend = env.get("ACCELERATE_FP8_BACKEND", "AO").upper()
    if "fp8" in (precision, requested) and backend not in ("AO", "NO"):
        conflicts.append(f"ACCELERATE_FP8_BACKEND={backend}: condot's fp8 is torchao's; use --fp8_backend ao")
    passes = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if passes is not None and passes != str(config.train.gradient_accumulation_steps):
        conflicts.append(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={passes} and "
            f"train.gradient_accumulation_steps={config.train.gradient_accumulation_steps}: leave it to the recipe"
        )
    compiler = env.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    if compiler != "NO" and not (compiler == "INDUCTOR" and config.train.compile):
        state = str(config.train.compile).lower()
        conflicts.append(
            f"ACCELERATE_DYNAMO_BACKEND={compiler} and train.compile={state}: "
            f"launch with `dynamo_backend: no` and compile by --train.compile=true, block by block with inductor"
        )
    return conflicts + (_fsdp_conflicts(config, env) if _env_flag(env, "ACCELERATE_USE_FSDP") else [])


def _fsdp_conflicts(config: Config, env: Mapping[str, str]) -> list[str]:
    """Return the launcher's FSDP settings that contradict the recipe."""
    conflicts = []
    version, strategy = env.get("FSDP_VERSION", "1"), _fsdp_strategy(env)
    if version != "2":
        conflicts.append(f"FSDP_VERSION={version}: condot shards by FSDP2; write `fsdp_version: 2` into the launcher's config")
    if strategy not in SHARDING_OF_STRATEGY:
        conflicts.append(f"FSDP_SHARDING_STRATEGY={strategy}: FULL_SHARD or HYBRID_SHARD; without sharding launch with MULTI_GPU")
    launched, requested = _sharding_from_env(env), config.train.sharding
    if requested == "none" or (requested == "full" and launched == "hybrid"):
        conflicts.append(f"ACCELERATE_USE_FSDP=true ({strategy}) and train.sharding={requested}: leave one out, or say the same in both")
    if env.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("true", "1", *map(str.lower, SHARDING_OF_STRATEGY)):
        conflicts.append("FSDP_RESHARD_AFTER_FORWARD=false: condot gives gathered weights back after the forward pass; say true")
    if _env_flag(env, "FSDP_OFFLOAD_PARAMS"):
        conflicts.append("FSDP_OFFLOAD_PARAMS=true: condot keeps its shares on the device; say false")
    if _env_flag(env, "FSDP_ACTIVATION_CHECKPOINTING") and not config.model.gradient_checkpointing:
        conflicts.append("FSDP_ACTIVATION_CHECKPOINTING=true and model.gradient_checkpointing=false: say it in the recipe")
    for axis in ("TP", "CP", "SP"):
        size = env.get(f"PARALLELISM_CONFIG_{axis}_SIZE", "1")
        if size != "1":
            conflicts.append(f"PARALLELISM_CONFIG_{axis}_SIZE={size}: condot splits batches and weights only; say 1")
    return conflicts


def _sharding_from_env(env: Mapping[str, str]) -> Sharding | None:
    """What the launcher's FSDP comes to; None without it."""
    if not _env_flag(env, "ACCELERATE_USE_FSDP"):
        return None
    replicas = env.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")
    return "hybrid" if replicas not in ("", "1") else SHARDING_OF_STRATEGY.get(_fsdp_strategy(env), "full")


def _fsdp_strategy(env: Mapping[str, str]) -> str:
    name = env.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    return FSDP1_STRATEGY_NAMES.get(name, name)


def _env_flag(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() in ("true", "1", "yes", "y", "t", "on")
