"""A scheduler for models that no stock scheduler serves: any Gaussian path, any prediction, from a table.

This file travels with exported models and stands alone: it needs torch and
diffusers only. Licence: Apache-2.0.

The noisy point is x = alpha z + beta eps, with data z and noise eps; timestep k
of 1000 has alpha, beta and their time derivatives in the configuration. A step
finds z and eps from x and the network's prediction and puts them together
again at the next timestep's alpha and beta; the last step ends on z. On the
straight path this is Euler's method, on paths of unit variance it is DDIM.
"""

import math
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput


class CondotScheduler(SchedulerMixin, ConfigMixin):
    """Steps of order one, deterministic, on 1000 timesteps; 0 is the data.

    Args:
        alphas, betas, alpha_slopes, beta_slopes: at timesteps 0 to 1000; slopes per unit of t = 1 - timestep / 1000.
        prediction_type: `velocity`, `noise`, `data`, `score` or `v`.
        sigma_data: standard deviation of the data if the network is scaled the Karras way, else 0.
        first_timestep: where sampling begins, 1000 unless the path is singular there.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        alphas: Any = (1.0, 0.0),
        betas: Any = (0.0, 1.0),
        alpha_slopes: Any = (1.0, 1.0),
        beta_slopes: Any = (-1.0, -1.0),
        prediction_type: str = "velocity",
        sigma_data: float = 0.0,
        first_timestep: int = 1000,
        num_train_timesteps: int = 1000,
    ) -> None:
        self.timesteps = torch.arange(first_timestep, 0, -1)

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, timesteps: Any = None, **kwargs: Any) -> None:
        """`num_inference_steps` timesteps, evenly from the first on; whole numbers, as many as there are at most."""
        first = self.config.first_timestep
        if timesteps is None:
            if not 1 <= num_inference_steps <= first:
                raise ValueError(f"num_inference_steps={num_inference_steps}: from 1 to {first}.")
            timesteps = [round(first * (1 - i / num_inference_steps)) for i in range(num_inference_steps)]
        self.timesteps = torch.as_tensor(timesteps, dtype=torch.int64, device=device)
        self.num_inference_steps = len(self.timesteps)

    def _coefficients(self, timestep: Any) -> tuple[float, float, float, float]:
        k, c = int(timestep), self.config
        return c.alphas[k], c.betas[k], c.alpha_slopes[k], c.beta_slopes[k]

    def _input_scale(self, timestep: Any) -> float:
        a, b, _, _ = self._coefficients(timestep)
        return 1 / math.sqrt((a * self.config.sigma_data) ** 2 + b**2) if self.config.sigma_data else 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """What the network sees; at the first timestep `sample` is standard normal noise and becomes a point of the path."""
        start = self._coefficients(timestep)[1] if int(timestep) == int(self.timesteps[0]) else 1.0
        return sample * (start * self._input_scale(timestep))

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        """From a timestep to the next.

        Args:
            model_output: the network's prediction, of the shape of `sample`.
            timestep: one of `timesteps`.
            sample: what `scale_model_input` gave.
        """
        a, b, da, db = self._coefficients(timestep)
        x, out = sample.float() / self._input_scale(timestep), model_output.float()
        kind = self.config.prediction_type
        if self.config.sigma_data:
            variance = (a * self.config.sigma_data) ** 2 + b**2
            out = a * self.config.sigma_data**2 / variance * x + b * self.config.sigma_data / math.sqrt(variance) * out
        if kind == "score":
            kind, out = "noise", -b * out
        u, w = {"data": (1.0, 0.0), "noise": (0.0, 1.0), "velocity": (da, db), "v": (-b, a)}[kind]
        determinant = a * w - b * u
        data, noise = (w * x - b * out) / determinant, (a * out - u * x) / determinant
        later = (self.timesteps < int(timestep)).nonzero()
        if len(later):
            a, b, _, _ = self._coefficients(self.timesteps[later[0, 0]])
            x = a * data + b * noise
        else:
            x = data
        x = x.to(model_output.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
