"""Classifier guidance: conditional samples of a model that was trained without the condition, as an inverse problem.

By Bayes' rule the score of p_t(x | y) is the model's and the gradient of what
a classifier says, `grad log p_t(x) + grad log p(y | x_t)`; with a scale w on
the second, that of the density proportional to `p_t(x) p(y | x_t)^w`. The
velocity follows by the identities of docs/mathematics.md section 2.
Source: Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis,
section 4; Song et al., Score-Based Generative Modeling through SDEs, section 5;
for a classifier of clean data Chung et al., Diffusion Posterior Sampling, eq. 11,
and Bansal et al., Universal Guidance for Diffusion Models, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .field import Field, shift_score_prediction, velocity_and_score
from .parameterisation import convert
from .path import Path, widen

LogLikelihood = Callable[[Tensor, Tensor], Tensor]  # of (B, *S) and times (B,): log p(y | .) of each sample, (B,)


def classifier_guide(field: Field, path: Path, log_likelihood: LogLikelihood, scale: float = 1.0, *, clean: bool = False) -> Field:
    """Guide a field by the gradient of a log-likelihood.

    Args:
        field: velocity of (x, t), or (velocity, score).
        path: its path, from a normal prior.
        log_likelihood: `log p(y | x_t)` of (x, t), differentiable, up to a constant: of a classifier that knows noise.
        scale: w, finite; 0 is the field itself. Exact at 1, sharper above.
        clean: the log-likelihood is of clean data, and is asked about the data
            prediction (t is passed on): one backward pass through the network
            more. Exact only where that is linear, as with log p(y | z) linear in
            Gaussian data; else log p(y | E[z | x]) stands for log E[p(y | z) | x].

    Returns:
        A field of what the given one returns, without derivatives (so beside
        `reconstruction_guidance`, guide what that returns: scores add up), for t > 0, since the term is
        0 times infinity where alpha = 0: begin the grid at 1e-3.

    Raises:
        ValueError: a scale that is not finite; a log-likelihood that is not one number per sample.
    """
    if not math.isfinite(scale):
        raise ValueError(f"classifier guidance scale={scale} is not finite: use 0 for none, 1 for the conditional density.")
    if scale == 0:
        return field

    def guided(x: Tensor, t: Tensor) -> Any:
        c = path(widen(t, x))
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            if clean:
                out = field(point, t)
                log_prob = log_likelihood(convert(velocity_and_score(out)[0], "velocity", "data", point, c), t)
            else:
                log_prob = log_likelihood(point, t)
            if log_prob.shape != (len(x),):
                raise ValueError(
                    f"the log-likelihood has shape {tuple(log_prob.shape)} for {len(x)} samples: one number each, (B,). "
                    f"Take log_softmax(logits)[range(B), labels]."
                )
            (gradient,) = torch.autograd.grad(log_prob.sum(), point)
        if not clean:
            out = field(x, t)
        detached = tuple(part.detach() for part in out) if isinstance(out, tuple) else out.detach()
        return shift_score_prediction(detached, scale * gradient, c)

    return guided
