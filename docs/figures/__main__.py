"""`python -m docs.figures --output docs/pictures`: train two small networks, draw every picture; about two minutes on one core."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from docs.figures import scenes
from docs.figures.table import table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description="The pictures of docs/theory.md, made by our own code.")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"), help="folder for the PNGs and the animated WebP")
    parser.add_argument("--steps", type=int, default=5000, help="training steps of the checkerboard's network; the moons take half")
    parser.add_argument("--table", action="store_true", help="print the rounding errors of all conversions instead, as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least one. Use 5000.")
    try:
        from docs.figures import charts, moving, still  # matplotlib, which the table does without
    except ImportError as error:
        parser.error(f"{error}: the pictures need matplotlib, `pip install matplotlib`.")

    options.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    board, moon = scenes.train(scenes.checkerboard, options.steps), scenes.train(scenes.moons, max(1, options.steps // 2))
    print(f"trained in {time.perf_counter() - start:.0f} s")
    still.draw_all(board, moon, options.output)
    charts.schedules(options.output)
    charts.convergence(moon, options.output)
    moving.flow_movie(board, options.output)
    for path in sorted(options.output.glob("*.*")):
        print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
