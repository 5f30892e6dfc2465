"""The trackers that a recipe can name, each with how it is made; a plugin adds to the table."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from condot.core.atomic_files import write_whole
from condot.core.registry import Registry

FINISH_TIMEOUT = 10.0
"""Seconds that the end of a run gives all trackers together for what waits."""


class TrackedRun(NamedTuple):
    """The run that a tracker shows."""

    project: str
    """What the recipe calls the project."""
    folder: Path
    """Of the run, whose name is the run's."""
    start: int
    """The step that it goes on from; 0 is a new run."""
    settings: dict[str, bool | int | float | str]
    """The recipe, flat."""


class TrackerKind(NamedTuple):
    """How a tracker is made."""

    build: Callable[[TrackedRun], Any]
    """Returns a `GeneralTracker` of Accelerate's, not yet started; called on the tracker's own thread."""
    package: str = ""
    """That must be installed; "" for none."""
    keeps_command: bool = False
    """It keeps the command line, so that signed URLs are cut from that first."""
    stores_settings: bool = False
    """Its `store_init_configuration` is to be called, once, with the recipe."""


TRACKERS: Registry[TrackerKind] = Registry("tracker")
"""Every tracker that `log.report_to` can name."""


def tracker(
    name: str, *, package: str = "", keeps_command: bool = False, stores_settings: bool = False
) -> Callable[[Callable[[TrackedRun], Any]], Callable[[TrackedRun], Any]]:
    """Return a decorator that registers what makes a tracker; arguments as in `TrackerKind`."""

    def decorate(build: Callable[[TrackedRun], Any]) -> Callable[[TrackedRun], Any]:
        TRACKERS.add(name, TrackerKind(build, package, keeps_command, stores_settings))
        return build

    return decorate


class RewindableTensorBoard(TensorBoardTracker):  # type: ignore[misc]
    """Accelerate's, and the way back."""

    def rewind(self, step: int) -> None:
        """What was told of later steps is to be forgotten: TensorBoard drops it when it reads the file that begins here."""
        self.finish()
        self.init_kwargs["purge_step"] = step + 1
        self.start()


class StepWandb(WandBTracker):  # type: ignore[misc]
    """Accelerate's, with the optimiser step as the axis: wandb's own counter refuses the steps that a resumed run does again."""

    def start(self) -> None:
        """Open the run."""
        super().start()
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        """Give values of a step."""
        super().log({**values, "step": step}, **more)


@tracker("tensorboard", package="tensorboard", stores_settings=True)
def _make_tensorboard(run: TrackedRun) -> RewindableTensorBoard:
    return RewindableTensorBoard("tensorboard", run.folder, purge_step=run.start + 1)


@tracker("trackio", package="trackio", keeps_command=True)
def _make_trackio(run: TrackedRun) -> TrackioTracker:
    return TrackioTracker(run.project, name=run.folder.name, config=run.settings, resume="allow" if run.start else "never")


@tracker("wandb", package="wandb", keeps_command=True)
def _make_wandb(run: TrackedRun) -> StepWandb:
    import wandb

    # without these every print goes through wandb, its end waits for the server, and its question for a key for an answer
    wanted_settings = {"console": "off", "finish_timeout": 0.8 * FINISH_TIMEOUT, "login_timeout": 30.0}
    settings = wandb.Settings(**{name: value for name, value in wanted_settings.items() if hasattr(wandb.Settings(), name)})
    options = {"config": run.settings, "allow_val_change": True, "settings": settings}
    return StepWandb(
        run.project, name=run.folder.name, id=_wandb_run_id(run.folder, run.start), resume="allow", dir=str(run.folder), **options
    )


def _wandb_run_id(folder: Path, start: int) -> str:
    """What wandb knows the run by, so that a resumed one goes on in the same place."""
    path = folder / "wandb.id"
    if start == 0 or not path.exists():
        write_whole(path, secrets.token_hex(8))
    return path.read_text()
