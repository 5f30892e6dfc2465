"""The process of a caller, left as it was found: Accelerate's state, random generators, torch's threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

STATES: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)
"""Accelerate keeps one of each in a process; a second run of another precision would be refused."""


@contextmanager
def leave_process_as_found() -> Iterator[None]:
    """Let a call have Accelerate's state to itself, and put back what it changes of the process.

    Raises:
        ValueError: in place of safetensors' own error, of a file that is damaged.
    """
    from safetensors import SafetensorError

    states = [dict(state._shared_state) for state in STATES]
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads = torch.get_num_threads()
    _fill_states([{}] * len(STATES))
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"a file of weights cannot be read ({error}): take another copy of it.") from error
    finally:
        _fill_states(states)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        torch.set_num_threads(threads)


def _fill_states(contents: list[dict[str, Any]]) -> None:
    for state, content in zip(STATES, contents, strict=True):
        state._shared_state.clear()
        state._shared_state.update(content)
