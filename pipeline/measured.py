"""Figures that `sample.py evaluate` and `retrieve` left beside a run, told by its model card: tables, and results that the Hub reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

EVALUATED = (
    "samples", "accuracy", "accuracy_of_held_out", "diversity", "diversity_of_real", "nearest", "nearest_of_held_out",
    "frechet", "frechet_of_train", "feature_width", "few", "guidance_scale", "solver", "steps",
)  # fmt: skip
"""What `sample.py evaluate` leaves in evaluation.json."""
RETRIEVED = (
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
"""What `sample.py retrieve` leaves in retrieval.json, and the card tells."""


def figures_of(run: Path, name: str, keys: tuple[str, ...], ema: str = "") -> dict[str, Any]:
    """What was measured on a run's last weights; empty if nothing was.

    A file is older than the weights if the run's metrics.jsonl was written
    after it: then training went on, and its figures are of others.

    Args:
        run: its folder; the file lies there or in its `export`.
        name: of the file.
        keys: what it must hold.
        ema: which weights it must be of; "" is the run's first average.
    """
    trained = run / "metrics.jsonl"
    since = trained.stat().st_mtime if trained.exists() else 0.0
    for path in (run / name, run / "export" / name):
        if path.is_file() and path.stat().st_mtime >= since:
            try:
                figures = json.loads(path.read_text())
            except ValueError:
                continue
            if isinstance(figures, dict) and all(key in figures for key in keys) and figures.get("ema", "") == ema:
                return figures
    return {}


def results_of(evaluation: dict[str, Any], retrieval: dict[str, Any], task: str, source: str) -> list[EvalResult]:
    """The main figures as the head of a card holds them; `source` names the real images."""
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


def tables_of(evaluation: dict[str, Any], retrieval: dict[str, Any]) -> str:
    """A section with what was measured and the settings; empty if nothing was."""
    tables = [table(figures) for table, figures in ((_classes, evaluation), (_captions, retrieval)) if figures]
    return "\n\n".join(["## Evaluation", *tables]) if tables else ""


def _classes(e: dict[str, Any]) -> str:
    """The table of `evaluate`."""
    rows = [
        ("a classifier puts it into its class", f"{e['accuracy']:.1%}", f"{e['accuracy_of_held_out']:.1%} of held-out images"),
        ("mean distance within a class", f"{e['diversity']:.3f}", f"{e['diversity_of_real']:.3f} of real images"),
        ("median distance to the nearest training image", f"{e['nearest']:.3f}", f"{e['nearest_of_held_out']:.3f} of held-out images"),
        (
            f"Frechet distance to held-out images, {e['feature_width']} features",
            f"{e['frechet']:.3f}",
            f"{e['frechet_of_train']:.3f} of training images",
        ),
    ]
    few = " There are too few images for so many features: compare distances with one another only." if e["few"] else ""
    how = f"{e['samples']:,} samples, solver {e['solver']}, {e['steps']} steps, guidance {e['guidance_scale']:g}.{few}"
    return f"{how}\n\n{_table(rows)}"


def _captions(r: dict[str, Any]) -> str:
    """The table of `retrieve`."""
    rows = [
        ("nearest to its own caption's image", _share(r["top1"], r["top1_interval"]), f"{r['chance']:.1%} by chance"),
        ("its own among the nearest five", _share(r["top5"], r["top5_interval"]), f"{r['chance_of_five']:.1%} by chance"),
        ("mean reciprocal rank", f"{r['mean_reciprocal_rank']:.3f}", f"{r['chance_of_rank']:.3f} by chance"),
    ]
    return f"{r['samples']:,} samples of captions, each looked for among {r['candidates']:,} real images.\n\n{_table(rows)}"


def _share(value: float, interval: tuple[float, float]) -> str:
    """A share with its 95 % interval."""
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _table(rows: list[tuple[str, str, str]]) -> str:
    """Rows under the head that both tables have."""
    return "\n".join(["| measure | samples | beside |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])
