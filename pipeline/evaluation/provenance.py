"""Which weights a figure, or an exported folder, is of: the step, the average, and a hash of every number in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from condot.core.plugins import valid_record

PROVENANCE_FILE = "provenance.json"
"""In an exported folder: what its weights were made of."""
NETWORK_FOLDERS = ("transformer", "unet")
WEIGHTS_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Weights, by what they are and by what they were made of."""

    sha256: str
    """Of their tensors, as `hash_tensors` takes it."""
    trained_sha256: str = ""
    """The same of the run's weights, before they got the names and signs of diffusers; "" where nobody knows."""
    step: int | None = None
    """Of the checkpoint that held those."""
    ema: str = ""
    """Which weights of the run; "" is its first average."""
    plugins: tuple[dict[str, str], ...] = ()
    """Name and hash of each plugin that they were trained with."""

    @classmethod
    def from_run(cls, sha256: str, step: int, ema: str, plugins: Any = ()) -> Provenance:
        """Return that of weights as a run's checkpoint holds them."""
        return cls(sha256=sha256, trained_sha256=sha256, step=step, ema=ema, plugins=tuple(valid_record(plugins)))

    def as_dict(self) -> dict[str, Any]:
        """Return what a figure tells of the weights it is of."""
        found = {"step": self.step, "ema": self.ema, "weights_sha256": self.sha256, "trained_sha256": self.trained_sha256}
        return found | ({"plugins": list(self.plugins)} if self.plugins else {})

    def matches(self, results: Mapping[str, Any]) -> bool:
        """Return whether results were measured on exactly these weights, as a run or an exported folder holds them."""
        own = {self.sha256, self.trained_sha256} - {""}
        return results.get("weights_sha256") in own or results.get("trained_sha256") in own


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of tensors: of name, type, shape and bytes of each, in the order of the names; however files share them out."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        found.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_provenance(folder: Path) -> Provenance:
    """Return that of an exported folder: its tensors are hashed, and what it says of their origin is believed if that hash agrees.

    Raises:
        ValueError: no weights in safetensors.
    """
    files = [path for part in NETWORK_FOLDERS for path in (folder / part).glob(f"{WEIGHTS_STEM}*.safetensors") if _is_full(path.name)]
    tensors: dict[str, Tensor] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} holds damaged weights ({error}): export it again.") from error
    if not tensors:
        raise ValueError(f"{folder} holds no weights in safetensors, so no figure could name them: export it again.")
    sha256 = hash_tensors(tensors)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads((folder / PROVENANCE_FILE).read_text())
        if said["weights_sha256"] == sha256:
            step, ema, plugins = int(said["step"]), str(said["ema"]), tuple(valid_record(said.get("plugins")))
            return Provenance(sha256=sha256, trained_sha256=str(said["trained_sha256"]), step=step, ema=ema, plugins=plugins)
    return Provenance(sha256=sha256)


def recorded_plugins(folder: Path) -> Any:
    """Return what an exported folder says of the plugins that its run was trained with; nothing of a folder that says none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / PROVENANCE_FILE).read_text()).get("plugins")
    return None


def _is_full(name: str) -> bool:
    """Return whether a file holds weights in full precision: `stem.safetensors` or `stem-00001-of-00002.safetensors`, no variant."""
    return "." not in name.removeprefix(WEIGHTS_STEM).removesuffix(".safetensors")


def write_provenance(folder: Path, provenance: Provenance, changes: Sequence[Mapping[str, Any]]) -> None:
    """Write it into an exported folder, with the journal of the run's settings."""
    (folder / PROVENANCE_FILE).write_text(json.dumps({**provenance.as_dict(), "settings": list(changes)}, indent=1) + "\n")
