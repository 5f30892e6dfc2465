"""How much rounding costs: the worst relative error of every conversion, as a table for docs/theory.md.

Times run over [1e-3, 1 - 1e-3]. Data and noise are normal; x and the
prediction are rounded once, to the precision a network works in, and what
comes out is compared with the exact target in float64. Three cases: float32;
the same under bf16 autocast, which path arithmetic must not feel; and a
prediction rounded to bf16, as a network under autocast hands it over.
"""

from __future__ import annotations

import torch

from condot.pipeline.flow import PATHS, PREDICTIONS, convert, interpolate, target

NAMES = ("condot", "cosine", "vp", "sub_vp", "ve", "edm", "ddpm", "ddpm_cosine")


def worst_errors(name: str, source: str, wanted: str, size: int = 64, times: int = 1999) -> tuple[float, float, float]:
    """Worst relative error over the times, in the norm over `size` values: float32, float32 under autocast, bf16 prediction."""
    path, generator = PATHS[name](), torch.Generator().manual_seed(0)
    data, noise = (torch.randn(times, size, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(1e-3, 1 - 1e-3, times).double()
    _, c = interpolate(path, data, noise, t)
    given, exact = target(source, data, noise, c), target(wanted, data, noise, c)  # type: ignore[arg-type]
    single_x, single_c = interpolate(path, data.float(), noise.float(), t.float())
    errors = []
    for autocast, rounded in ((False, given.float()), (True, given.float()), (True, given.bfloat16())):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = convert(rounded, source, wanted, single_x, single_c)  # type: ignore[arg-type]
        assert out.dtype == torch.float32 or source == wanted
        errors.append(((out.double() - exact).norm(dim=1) / exact.norm(dim=1)).max().item())
    return errors[0], errors[1], errors[2]


def table() -> str:
    """Markdown: one row per conversion, one column per path; float32 error, and in brackets that of a bf16 prediction."""
    lines = ["| conversion | " + " | ".join(NAMES) + " |", "|---|" + "---|" * len(NAMES)]
    for source in PREDICTIONS:
        for wanted in PREDICTIONS:
            if source == wanted:
                continue
            cells = []
            for name in NAMES:
                single, under, half = worst_errors(name, source, wanted)
                if single != under:
                    raise AssertionError(f"autocast changed {source} -> {wanted} on {name}: {single} and {under}")
                cells.append(f"{single:.0e} ({half:.0e})")
            lines.append(f"| {source} → {wanted} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
