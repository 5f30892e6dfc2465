"""Results that `condot evaluate` and `retrieve` left, told by the model card of exactly the weights they are of: tables, and results."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from condot.core.printable import say

from .markdown import code_span, escape_markdown
from .metrics import METRICS, build_metrics
from .provenance import Provenance

HOUSE_METRICS = {name: metric for name, metric in build_metrics().items() if not METRICS.source(name)}
EVALUATION_KEYS = (
    "samples", *(key for metric in HOUSE_METRICS.values() for key in metric.keys), "guidance_scale", "solver", "steps",
)  # fmt: skip
"""What `condot evaluate` leaves in evaluation.json; figures of a plugin's metrics may stand beside it."""
MAX_PLUGIN_ROWS = 20
"""Rows of a plugin's metrics that a card shows."""
RETRIEVAL_KEYS = (
    "samples",
    "candidates",
    "top1",
    "top1_interval",
    "top5",
    "top5_interval",
    "mean_reciprocal_rank",
    "chance",
    "chance_of_five",
    "chance_of_rank",
)
"""What `condot retrieve` leaves in retrieval.json, and the card tells."""


def read_results(places: Sequence[Path], name: str, keys: tuple[str, ...], provenance: Provenance | None) -> dict[str, Any]:
    """Return what was measured on exactly these weights; empty if nothing was. What is left out is told, with the reason.

    Args:
        places: folders where the file may lie.
        name: of the file.
        keys: what it must hold.
        provenance: of the weights.
    """
    for path in (folder / name for folder in dict.fromkeys(places)):
        if not path.is_file():
            continue
        try:
            results = json.loads(path.read_text())
            problem = _why_unusable(results, keys, provenance)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            problem = f"it cannot be read ({type(error).__name__})"
        if not problem:
            return dict(results)
        say(f"{path} is left out of the card: {problem}.")
    return {}


def _why_unusable(results: Any, keys: tuple[str, ...], provenance: Provenance | None) -> str:
    """Why results cannot be told of these weights; "" if they can."""
    lacking = [key for key in keys if key not in results]
    if not isinstance(results, dict) or lacking:
        return f"it lacks {', '.join(lacking)}"
    odd = [key for key in keys if not _is_valid(key, results[key])]
    if odd:
        return f"{odd[0]}={results[odd[0]]!r:.60} is no figure"
    if "weights_sha256" not in results:
        return "it does not name the weights that it is of, as older ones did not: measure again"
    if provenance is None or not provenance.matches(results):
        here = f", and these are of step {provenance.step}" if provenance and provenance.step is not None else ""
        return f"it is of other weights (step {results.get('step')!s:.20}, {results.get('ema') or 'the first average'!s:.40}){here}"
    return ""


def _is_valid(key: str, value: Any) -> bool:
    """Return whether a value can stand in a table: a finite number, two for an interval, a short name of a solver."""
    if key == "solver":
        return isinstance(value, str) and len(value) < 100
    if key.endswith("_interval"):
        return isinstance(value, list) and len(value) == 2 and all(_is_valid("", one) for one in value)
    return isinstance(value, (int, float)) and math.isfinite(value)


def eval_results(evaluation: dict[str, Any], retrieval: dict[str, Any], task: str, source: str) -> list[EvalResult]:
    """The main results as the head of a card holds them; `source` names the real images."""
    found: list[tuple[str, str, float]] = []
    if evaluation:
        frechet = f"Frechet distance to held-out images, {evaluation['feature_width']} features"
        found.append(("accuracy", "share of samples that a classifier puts into their class", evaluation["accuracy"]))
        found.append(("frechet_distance", frechet, evaluation["frechet"]))
    if retrieval:
        name = f"samples nearest to their caption's image among {retrieval['candidates']}"
        found.append(("top1_retrieval", name, retrieval["top1"]))
    return [
        EvalResult(
            task_type=task, dataset_type=source, dataset_name=source, metric_type=kind, metric_name=name, metric_value=round(value, 5)
        )
        for kind, name, value in found
    ]


def results_section(evaluation: dict[str, Any], retrieval: dict[str, Any]) -> str:
    """A section with what was measured and the settings; empty if nothing was."""
    tables = [
        f"{table(results)}\n\n{_measured_on(results)}"
        for table, results in ((_evaluation_table, evaluation), (_retrieval_table, retrieval))
        if results
    ]
    return "\n\n".join(["## Evaluation", *tables]) if tables else ""


def _measured_on(results: dict[str, Any]) -> str:
    """Return of which weights results are, and by which others their samples were guided."""
    step = f"of step {results['step']}, " if isinstance(results.get("step"), int) else ""
    guide = (
        f" The samples were guided by another, weaker model ({code_span(str(results['guide_sha256']))})."
        if results.get("guide_sha256")
        else ""
    )
    return f"Measured on exactly these weights: {step}SHA-256 of their tensors {code_span(str(results['weights_sha256']))}.{guide}"


def _evaluation_table(e: dict[str, Any]) -> str:
    """The table of `evaluate`."""
    shown = [metric.row(e) for metric in HOUSE_METRICS.values()]
    rows = [(row.card_label or row.label, row.value, row.beside) for row in shown]
    rows += [typing.cast(tuple[str, str, str], tuple(map(escape_markdown, row))) for row in _plugin_rows(e)]
    few = " There are too few images for so many features: compare distances with one another only." if e["few"] else ""
    how = f"{e['samples']:,} samples, solver {escape_markdown(e['solver'])}, {e['steps']} steps, guidance {e['guidance_scale']:g}.{few}"
    return f"{how}\n\n{_table(rows)}"


def _plugin_rows(e: dict[str, Any]) -> list[list[str]]:
    """Return the rows that metrics of plugins left, which may be a stranger's: three short texts each."""
    rows = e.get("plugin_rows")
    rows = rows[:MAX_PLUGIN_ROWS] if isinstance(rows, list) else []
    return [row for row in rows if isinstance(row, list) and len(row) == 3 and all(isinstance(one, str) and len(one) < 100 for one in row)]


def _retrieval_table(r: dict[str, Any]) -> str:
    """The table of `retrieve`."""
    rows = [
        ("nearest to its own caption's image", _format_share(r["top1"], r["top1_interval"]), f"{r['chance']:.1%} by chance"),
        ("its own among the nearest five", _format_share(r["top5"], r["top5_interval"]), f"{r['chance_of_five']:.1%} by chance"),
        ("mean reciprocal rank", f"{r['mean_reciprocal_rank']:.3f}", f"{r['chance_of_rank']:.3f} by chance"),
    ]
    return f"{r['samples']:,} samples of captions, each looked for among {r['candidates']:,} real images.\n\n{_table(rows)}"


def _format_share(value: float, interval: tuple[float, float]) -> str:
    """A share with its 95 % interval."""
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _table(rows: list[tuple[str, str, str]]) -> str:
    """Rows under the head that both tables have."""
    return "\n".join(["| measure | samples | beside |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])
