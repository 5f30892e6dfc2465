"""`condot train --dry_run`: what the dry run tries of `data/` and `models/`, which it does not know."""

from __future__ import annotations

from condot.core.data_config import parse_size
from condot.data.loader.build import check_sides
from condot.data.loader.stream import Share
from condot.data.loader.survey import survey
from condot.models import memory, registry
from condot.models.cost import count_params_and_macs, example_inputs
from condot.models.init_from import init_from_published
from condot.models.lora import add_lora
from condot.pipeline.dry_run.resolved_recipe import DryRunHooks

from .assembly.open_inputs import check_exportable

DRY_RUN_HOOKS = DryRunHooks(
    bytes_of=parse_size,
    survey=survey,
    check_sides=check_sides,
    share=Share,
    build_model=registry.build,
    example_inputs=example_inputs,
    count_params_and_macs=count_params_and_macs,
    fsdp_units=memory.fsdp_units,
    estimate_memory=memory.estimate_memory,
    measure_memory=memory.measure_memory,
    inference_cost=memory.inference_cost,
    add_lora=add_lora,
    init_from_published=init_from_published,
    checks=(
        lambda config, space, seen: (
            check_exportable(config, space, len(seen.class_names), len(seen.text_encoders)) if config.export else None
        ),
    ),
)
"""What a dry run tries of the other rooms."""
