"""CondotPipeline: images of classes or captions from any network that condot trains, by a scheduler, an ODE or an SDE solver.

It travels with exported models and stands alone: torch, diffusers and transformers are all it needs. Licence: Apache-2.0.
"""

import inspect
from typing import Any, Optional

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .captions_v1 import Captions, encode, is_clip, joined
from .guidance_v1 import Guidance
from .scheduling_flow_ode_v1 import FlowODEScheduler
from .scheduling_flow_sde_v1 import FlowSDEScheduler

NO_CLASS = 1000
"""The label that stands for none, in every exported network on classes."""


def language(scheduler: Any) -> Any:
    """What a scheduler takes a network's output for: a prediction, and whether on the straight path."""
    config = scheduler.config
    straight = type(scheduler).__name__.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    return config.get("prediction_type", "flow_prediction" if straight else "epsilon"), straight


class CondotPipeline(DiffusionPipeline):
    """Sampling of a network on classes, on captions or on nothing, in pixels or latents.

    Args:
        transformer, unet: the network, one of them.
        scheduler: of diffusers or of this file.
        vae: the autoencoder; None for pixels.
        tokenizer..., text_encoder...: one pair for each encoder that the network was trained with, in its order.
        id2label: name of each class; none for networks without.
        padding: `mask` where encoder and network never look at padding, `attend` where both do; by default as the network can.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->unet->vae"
    _optional_components = [
        "transformer", "unet", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3",
    ]  # fmt: skip
    FlowODEScheduler, FlowSDEScheduler = FlowODEScheduler, FlowSDEScheduler

    def __init__(
        self,
        scheduler: Any,
        transformer: torch.nn.Module = None,  # type: ignore[assignment]
        unet: torch.nn.Module = None,  # type: ignore[assignment]
        vae: torch.nn.Module = None,  # type: ignore[assignment]
        tokenizer: Any = None,
        text_encoder: torch.nn.Module = None,  # type: ignore[assignment]
        tokenizer_2: Any = None,
        text_encoder_2: torch.nn.Module = None,  # type: ignore[assignment]
        tokenizer_3: Any = None,
        text_encoder_3: torch.nn.Module = None,  # type: ignore[assignment]
        id2label: Optional[dict] = None,  # noqa: UP045
        padding: str = "",
    ) -> None:
        super().__init__()
        self.register_modules(
            scheduler=scheduler, transformer=transformer, unet=unet, vae=vae, tokenizer=tokenizer, text_encoder=text_encoder,
            tokenizer_2=tokenizer_2, text_encoder_2=text_encoder_2, tokenizer_3=tokenizer_3, text_encoder_3=text_encoder_3,
        )  # fmt: skip
        self.register_to_config(id2label=id2label, padding=padding)
        self.names = {int(number): name for number, name in (id2label or {}).items()}
        self.trained = language(scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @property
    def network(self) -> Any:
        """Transformer or U-Net."""
        return self.transformer if self.transformer is not None else self.unet

    @property
    def factor(self) -> int:
        """Pixels a side of one value of a sample."""
        config = {} if self.vae is None else self.vae.config
        return 2 ** (len(config.get("encoder_block_out_channels") or config.get("block_out_channels") or (0,)) - 1)

    @property
    def encoders(self) -> Any:
        """Tokenizer and encoder of each text encoder, in order."""
        pairs = [(getattr(self, f"tokenizer{end}"), getattr(self, f"text_encoder{end}")) for end in ("", "_2", "_3")]
        return [pair for pair in pairs if pair[1] is not None]

    @torch.no_grad()
    def encode_prompt(self, prompt: Any, device: Any = None) -> Captions:
        """Captions, a list, as the network takes them."""
        device = device or self._execution_device
        padded = (self.config.padding or ("attend" if type(self.network).__name__ == "SD3Transformer2DModel" else "mask")) == "attend"
        parts = [encode(tokenizer, encoder, list(prompt), padded, device) for tokenizer, encoder in self.encoders]
        found = joined(parts, [is_clip(encoder) for _, encoder in self.encoders])
        return Captions(found.states.to(self.network.dtype), found.mask, found.pooled.to(self.network.dtype))

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, condition: Any, sizes: Any = None) -> torch.Tensor:
        """The network's output.

        Args:
            x: (B, C, h, w).
            timestep: (B,), 1000 at the noise, 0 at the data.
            condition: labels (B,), NO_CLASS for none; or Captions.
            sizes: (B, 6), pixels: height and width of the original, top and left of the crop, height and width of the image.
        """
        network, told = self.network, {"return_dict": False, "sizes": sizes}
        if isinstance(condition, Captions):
            told["encoder_hidden_states"], told["encoder_attention_mask"], told["pooled_projections"] = condition
            unet = {"text_embeds": condition.pooled, "time_ids": sizes}
            told["added_cond_kwargs"] = unet if "addition_embed_type" in network.config else {"resolution": None, "aspect_ratio": None}
        elif "num_class_embeds" not in network.config or network.config.num_class_embeds:
            told["class_labels"] = condition
        known = inspect.signature(network.forward).parameters
        told = {name: value for name, value in told.items() if name in known}
        return network(x, timestep=timestep, **told)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, -1..1, (B, C, H, W), of samples."""
        if self.vae is None:
            return latents
        config = self.vae.config
        own = latents / config.scaling_factor + (config.get("shift_factor") or 0)
        return self.vae.decode(own.to(self.vae.dtype), return_dict=False)[0]

    def sampler(self, solver: Any, sigma_t: Any, sigma_scale: Any) -> Any:
        """The scheduler that follows the flow by a solver's name; the pipeline's own without one."""
        noise = {name: value for name, value in (("sigma_t", sigma_t), ("sigma_scale", sigma_scale)) if value is not None}
        if language(self.scheduler) != self.trained:
            raise ValueError(
                f"{type(self.scheduler).__name__} takes the network's output for {language(self.scheduler)}, and it is "
                f"{self.trained} (prediction, straight path): build the scheduler by its from_config(pipe.scheduler.config)."
            )
        if solver is None and not noise:
            return self.scheduler
        if solver in FlowODEScheduler.solvers and not noise:
            return FlowODEScheduler.from_config(self.scheduler.config, solver=solver)
        if solver is None or solver in FlowSDEScheduler.solvers:
            more = {"solver": solver} if solver else {}
            return FlowSDEScheduler.from_config(self.scheduler.config, **more, **noise)
        known = ", ".join((*FlowODEScheduler.solvers, *FlowSDEScheduler.solvers))
        raise ValueError(f"solver={solver!r} with {noise or 'no noise'}: choose one of {known}; the last three alone take sigma_t.")

    def _conditions(self, class_labels: Any, prompt: Any, negative_prompt: Any, count: int, guided: bool) -> Any:
        """What each image is told, and if it is guided what it is led away from behind; as many as images."""
        text, device = bool(self.encoders), self._execution_device
        if text != (prompt is not None) or bool(self.names) > (class_labels is not None) or (text and class_labels is not None):
            wanted = "prompt, and no class_labels" if text else f"{'class_labels, and ' if self.names else ''}no prompt"
            raise ValueError(f"class_labels={class_labels}, prompt={prompt!r}: this model takes {wanted}.")
        if not text and negative_prompt is not None:
            raise ValueError(f"negative_prompt={negative_prompt!r}: this model takes no text. Leave it out.")
        if text:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            away = [negative_prompt or ""] * len(prompts) if isinstance(negative_prompt or "", str) else list(negative_prompt)
            if not prompts or len(away) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts and {len(away)} negative prompts: give one, or one for each prompt.")
            found = self.encode_prompt(prompts + away if guided else prompts, device)
            return Captions(*(part.repeat_interleave(count, dim=0) for part in found))
        labels = [class_labels] if isinstance(class_labels, (int, str)) else class_labels
        if labels is None:
            labels = [NO_CLASS]
        numbers = {name: number for number, name in self.names.items()}
        labels = [numbers.get(label, label) if isinstance(label, str) else int(label) for label in labels]
        bad = [label for label in labels if label != NO_CLASS and label not in self.names]
        if bad or not labels:
            known = f"has classes 0 to {len(self.names) - 1}, and {NO_CLASS} for none" if self.names else "has no classes"
            raise ValueError(f"class_labels={bad[:3]}: the model {known}.")
        told = torch.tensor(labels, device=device).repeat_interleave(count)
        return torch.cat([told, torch.full_like(told, NO_CLASS)]) if guided else told

    def _shape(self, height: Any, width: Any) -> Any:
        """(C, h, w) of a sample."""
        config, side = self.network.config, self.network.config.sample_size
        unit = self.factor * int(config.get("patch_size") or 2 ** (len(config.get("block_out_channels", (0,))) - 1))
        height, width = height or side * self.factor, width or side * self.factor
        if height % unit or width % unit or min(height, width) < unit:
            raise ValueError(f"height={height}, width={width}: multiples of {unit} pixels, the usual image is {side * self.factor} a side.")
        return config.in_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        prompt: Any = None,
        negative_prompt: Any = None,
        height: Any = None,
        width: Any = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        guidance_interval: Any = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        solver: Any = None,
        sigma_t: Any = None,
        sigma_scale: Any = None,
        num_images_per_prompt: int = 1,
        original_size: Any = None,
        crop: Any = (0, 0),
        generator: Any = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
    ) -> Any:
        """Draw images.

        Args:
            class_labels: of each image, numbers or names; of a model on classes.
            prompt: captions, one or a list; of a model on text.
            negative_prompt: what guidance leads away from; by default from no caption.
            height, width: pixels; by default the size of training.
            num_inference_steps: steps; some solvers evaluate the network several times in each.
            guidance_scale: 1 is none.
            guidance_interval: times between which guidance acts, 0 the noise, 1 the data.
            guidance_rescale: share, 0 to 1, of the guided prediction brought back to the spread of the unguided one.
            solver: euler, midpoint, heun, rk4, multistep: the ODE; exponential, euler_maruyama, stochastic_heun: the SDE;
                by default `pipe.scheduler`.
            sigma_t, sigma_scale: of the SDE, as in FlowSDEScheduler: zero, constant, noise, forward or a list.
            num_images_per_prompt: of each class or caption.
            original_size, crop: height and width of the original, top and left of the crop, for a network that is told sizes.
            generator: of all noise, one or one per image.
            latents: the noise to begin with, (B, C, h, w).
            output_type: pil, np, pt or latent.
            return_dict: False for a tuple.
            callback_on_step_end, callback_on_step_end_tensor_inputs: called after each evaluation with (pipe, number, timestep,
                {"latents": ...}); may return new ones.

        Raises:
            ValueError: a condition, a size, a scale or a solver that this model does not take.
        """
        first, last = guidance_interval
        guidance = Guidance(guidance_scale, first, last, guidance_rescale)
        guidance.check()
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: at least 1.")
        if list(callback_on_step_end_tensor_inputs) != ["latents"]:
            raise ValueError(f"callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs}: there is ['latents'] alone.")
        if guidance_scale != 1 and not self.encoders and not self.names:
            raise ValueError(f"guidance_scale={guidance_scale}: the model has neither classes nor text to guide by. Use 1.")
        scheduler, shape = self.sampler(solver, sigma_t, sigma_scale), self._shape(height, width)
        condition = self._conditions(class_labels, prompt, negative_prompt, num_images_per_prompt, guidance_scale != 1)
        count = (len(condition.mask) if isinstance(condition, Captions) else len(condition)) // (1 + (guidance_scale != 1))
        device = self._execution_device
        pixels = [part * self.factor for part in shape[1:]]
        sizes = torch.tensor([[*(original_size or pixels), *crop, *pixels]], dtype=torch.float32, device=device)
        scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            latents = randn_tensor((count, *shape), generator=generator, device=device, dtype=self.network.dtype)
        elif tuple(latents.shape) != (count, *shape):
            raise ValueError(f"latents of shape {tuple(latents.shape)}: give noise of {(count, *shape)}.")
        x = latents.to(device, self.network.dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        x = self._follow(scheduler, x, condition, sizes, guidance, generator, callback_on_step_end)
        images = x if output_type == "latent" else self.image_processor.postprocess(self.decode(x).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _follow(
        self, scheduler: Any, x: Any, condition: Any, sizes: Any, guidance: Guidance, generator: Any, callback: Any
    ) -> torch.Tensor:
        """From noise, (B, C, h, w), to samples; arguments as of the call."""
        self._guidance_scale, self._interrupt, self._num_timesteps = guidance.scale, False, len(scheduler.timesteps)
        more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            for i, k in enumerate(scheduler.timesteps):
                if self._interrupt:
                    break
                x = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
                inside = guidance[1:3] == (0, 1) or guidance.holds(1 - float(k) / scheduler.config.num_train_timesteps)
                x = scheduler.step(self._guided(x, k, condition, sizes, guidance, inside), k, x, return_dict=False, **more)[0]
                if callback is not None:
                    x = callback(self, i, k, {"latents": x}).get("latents", x)
                bar.update()
        return x

    def _guided(self, x: torch.Tensor, k: Any, condition: Any, sizes: Any, guidance: Guidance, inside: bool) -> torch.Tensor:
        """The network's output at timestep k; guided, of a batch of 2 B."""
        count = len(x)
        both = guidance.scale != 1 and inside
        if guidance.scale != 1 and not inside:
            condition = Captions(*(part[:count] for part in condition)) if isinstance(condition, Captions) else condition[:count]
        seen = torch.cat([x, x]) if both else x
        out = self.predict(seen, k.to(x.device).expand(len(seen)), condition, sizes.expand(len(seen), 6))
        return guidance.sharpen(*out.chunk(2)) if both else out

    @property
    def guidance_scale(self) -> float:
        """Of the call that runs."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the call that runs."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` from a callback to end with what is there."""
        return self._interrupt
