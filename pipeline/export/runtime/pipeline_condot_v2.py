"""CondotPipeline: images of classes or captions from any network that condot trains, by a scheduler, an ODE or an SDE solver.

It travels with exported models and stands alone: torch, diffusers and transformers are all it needs. Licence: Apache-2.0.
Since version 1: the network alone sees what a scheduler scales, a scheduler that cannot follow the network is refused,
guidance is also projected (APG) or scaled (CFG-Zero*), and what cannot be drawn is said before any work.
"""

import inspect
from typing import Any, Optional

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from .captions_v1 import Captions, encode, is_clip, joined
from .guidance_v2 import Guidance, Guide
from .inputs_v2 import check_latents, check_outputs, generators, labels_of, numbered_classes, prompts_of, size_of, sizes_of, whole
from .pipeline_condot_v1 import NO_CLASS
from .scheduler_check_v2 import OURS, check_scheduler, inside, said_by, with_its_path
from .scheduling_flow_ode_v2 import FlowODEScheduler
from .scheduling_flow_sde_v2 import FlowSDEScheduler


class CondotPipeline(DiffusionPipeline):
    """Sampling of a network on classes, on captions or on nothing, in pixels or latents.

    Args:
        transformer, unet: the network, one of them.
        scheduler: of diffusers or of this file.
        vae: the autoencoder; None for pixels.
        tokenizer..., text_encoder...: one pair for each encoder that the network was trained with, in its order.
        id2label: name of each class; empty for none; None for as many numbers as the network knows.
        padding: `mask` where encoder and network never look at padding, `attend` where both do; by default as the network can.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->unet->vae"
    _optional_components = [
        "transformer", "unet", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3",
    ]  # fmt: skip
    _callback_tensor_inputs = ["latents"]
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
        if self.network is None:
            raise ValueError("neither transformer nor unet: give the network that draws, as transformer=pipe.transformer.")
        known = numbered_classes(self) if id2label is None else id2label
        self.names = {int(number): name for number, name in known.items()}
        self.trained = said_by(scheduler.config)
        self._came, self._tried = scheduler, scheduler if type(scheduler).__name__ in OURS else None
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Build a pipeline of another's parts, whatever their classes; `kwargs` go before them."""
        parts = {name: part for name, part in pipeline.components.items() if name in cls._optional_components}
        return super().from_pipe(pipeline, **{**parts, **kwargs})

    @property
    def components(self) -> Any:
        """Return all that a pipeline of the same class is made of, `type(pipe)(**pipe.components)`: parts, names of classes, padding."""
        return {**super().components, "id2label": self.config.id2label, "padding": self.config.padding}

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
        """Return captions, a list, as the network takes them."""
        device = device or self._execution_device
        padded = (self.config.padding or ("attend" if type(self.network).__name__ == "SD3Transformer2DModel" else "mask")) == "attend"
        parts = [encode(tokenizer, encoder, list(prompt), padded, device) for tokenizer, encoder in self.encoders]
        found = joined(parts, [is_clip(encoder) for _, encoder in self.encoders])
        return Captions(found.states.to(self.network.dtype), found.mask, found.pooled.to(self.network.dtype))

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, condition: Any, sizes: Any = None) -> torch.Tensor:
        """Return the network's prediction, (B, C, h, w): of the two that `outputs` may return, the first."""
        return self.outputs(x, timestep, condition, sizes)[:, : x.shape[1]]

    def outputs(self, x: torch.Tensor, timestep: torch.Tensor, condition: Any, sizes: Any = None) -> torch.Tensor:
        """Return all that the network gives, (B, C or 2 C, h, w).

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
        """Return images, -1..1, (B, C, H, W), of samples."""
        if self.vae is None:
            return latents
        config = self.vae.config
        own = latents / config.scaling_factor + (config.get("shift_factor") or 0)
        return self.vae.decode(own.to(self.vae.dtype), return_dict=False)[0]

    @property
    def clock(self) -> Any:
        """Return a scheduler of ours of the network's own path and prediction, for what it knows of them."""
        return FlowODEScheduler.from_config(with_its_path(self._came.config))

    def sampler(self, solver: Any, sigma_t: Any, sigma_scale: Any) -> Any:
        """Return the scheduler that follows the flow by a solver's name; the pipeline's own without one.

        Raises:
            ValueError: a solver that is unknown or takes no noise, a scheduler that cannot follow the network.
        """
        noise = {name: value for name, value in (("sigma_t", sigma_t), ("sigma_scale", sigma_scale)) if value is not None}
        if self.scheduler is not self._tried:
            check_scheduler(self.scheduler, self.clock, self.trained)
            self._tried = self.scheduler
        if solver is None and not noise:
            return self.scheduler
        if solver in FlowODEScheduler.solvers and not noise:
            return FlowODEScheduler.from_config(self.scheduler.config, solver=solver)
        if solver is None or solver in FlowSDEScheduler.solvers:
            more = {"solver": solver} if solver else {}
            return FlowSDEScheduler.from_config(self.scheduler.config, **more, **noise)
        known = ", ".join((*FlowODEScheduler.solvers, *FlowSDEScheduler.solvers))
        takers = ", ".join(FlowSDEScheduler.solvers)
        raise ValueError(f"solver={solver!r} with {noise or 'no noise'}: choose one of {known}; {takers} alone take sigma_t.")

    def _conditions(self, class_labels: Any, prompt: Any, negative_prompt: Any, count: int, guided: bool) -> Any:
        """Return how many images, and a function to what each is told and, if guided, what it is led away from behind."""
        text, device = bool(self.encoders), self._execution_device
        needed = bool(self.names) and self.config.id2label is not None
        if text != (prompt is not None) or needed > (class_labels is not None) or (text and class_labels is not None):
            wanted = "prompt, and no class_labels" if text else f"{'class_labels, and ' if self.names else ''}no prompt"
            raise ValueError(f"class_labels={class_labels}, prompt={prompt!r}: this model takes {wanted}.")
        if not text and negative_prompt is not None:
            raise ValueError(f"negative_prompt={negative_prompt!r}: this model takes no text. Leave it out.")
        if guided and not text and class_labels is None:
            raise ValueError("guidance_scale other than 1: the model has neither classes nor text to guide by. Use 1.")
        if text:
            prompts, away = prompts_of(prompt, negative_prompt)

            def read() -> Captions:
                found = self.encode_prompt(prompts + away if guided else prompts, device)
                return Captions(*(part.repeat_interleave(count, dim=0) for part in found))

            return count * len(prompts), read
        told = torch.tensor(labels_of(class_labels, self.names), device=device).repeat_interleave(count)
        return len(told), lambda: torch.cat([told, torch.full_like(told, NO_CLASS)]) if guided else told

    def _shape(self, height: Any, width: Any) -> Any:
        """Return (C, h, w) of a sample; errors as of `size_of`."""
        return self.network.config.in_channels, *size_of(self.network, self.factor, height, width)

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
        guidance: str = "cfg",
        apg_eta: float = 0.0,
        apg_norm_threshold: float = 0.0,
        apg_momentum: float = 0.0,
        zero_init_steps: int = 0,
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
            solver: one of FlowODEScheduler.solvers, the ODE, or of FlowSDEScheduler.solvers, the SDE; by default `pipe.scheduler`.
            sigma_t, sigma_scale: of the SDE, as in FlowSDEScheduler: zero, constant, noise, forward or a list.
            num_images_per_prompt: of each class or caption.
            original_size, crop: height and width of the original, top and left of the crop, for a network that is told sizes.
            generator: of all noise, one or one per image.
            latents: the noise to begin with, (B, C, h, w).
            output_type: pil, np, pt or latent.
            return_dict: False for a tuple.
            callback_on_step_end: called after each evaluation with (pipe, number, timestep, {"latents": ...}); may return new ones.
            guidance: cfg, apg or cfg_zero_star, the last of networks that predict a velocity.
            apg_eta, apg_norm_threshold, apg_momentum: of apg: share of what is parallel to the data prediction, greatest length
                (0 for any), and how much of the last direction is added.
            zero_init_steps: of cfg_zero_star: in so many first steps nothing moves.

        Raises:
            ValueError: a condition, a size, a scale, a number, a scheduler or a solver that this model does not take.
        """
        apg, still = (apg_eta, apg_norm_threshold, apg_momentum), whole("zero_init_steps", zero_init_steps, 0)
        how = Guidance(guidance_scale, guidance_interval, guidance_rescale, guidance, *apg, still)
        how.check(self.trained[0], whole("num_inference_steps", num_inference_steps, 1))
        names = check_outputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        each, shape = whole("num_images_per_prompt", num_images_per_prompt, 1), self._shape(height, width)
        count, read = self._conditions(class_labels, prompt, negative_prompt, each, guidance_scale != 1)
        generator, device = generators(generator, count), self._execution_device
        check_latents(latents, (count, *shape))
        sizes = sizes_of(original_size, crop, [part * self.factor for part in shape[1:]]).to(device)
        scheduler = self.sampler(solver, sigma_t, sigma_scale)
        scheduler.set_timesteps(int(num_inference_steps), device=device)
        if latents is None:
            latents = randn_tensor((count, *shape), generator=generator, device=device, dtype=self.network.dtype)
        x = latents.to(device, self.network.dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        x = self._follow(scheduler, x, read(), sizes, Guide(how), generator, (callback_on_step_end, names))
        images = x if output_type == "latent" else self.image_processor.postprocess(self.decode(x).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _follow(self, scheduler: Any, x: Any, condition: Any, sizes: Any, guide: Guide, generator: Any, told: Any) -> torch.Tensor:
        """Return samples, (B, C, h, w), from noise; arguments as of the call. The scheduler steps on x, the network sees it scaled."""
        how, (callback, names), times = guide.guidance, told, scheduler.timesteps
        self._guidance_scale, self._interrupt, self._num_timesteps = how.scale, False, len(times)
        more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        still = times[how.zero_init_steps * getattr(scheduler, "order", 1)] if how.zero_init_steps else None
        with self.progress_bar(total=len(times)) as bar:
            for i, k in enumerate(times):
                if self._interrupt:
                    break
                seen = scheduler.scale_model_input(x, k) if hasattr(scheduler, "scale_model_input") else x
                out = torch.zeros_like(x) if still is not None and bool(k > still) else self._guided(seen, k, condition, sizes, guide)
                x = scheduler.step(out, k, x, return_dict=False, **more)[0]
                if callback is not None:
                    x = (callback(self, i, k, dict.fromkeys(names, x)) or {}).get("latents", x)
                bar.update()
        return x

    def _guided(self, x: torch.Tensor, k: Any, condition: Any, sizes: Any, guide: Guide) -> torch.Tensor:
        """Return the network's output at timestep k; guided, of a batch of 2 B."""
        count, how = len(x), guide.guidance
        both = how.scale != 1 and (tuple(how.interval) == (0, 1) or how.holds(1 - float(k) / 1000))
        if how.scale != 1 and not both:
            condition = Captions(*(part[:count] for part in condition)) if isinstance(condition, Captions) else condition[:count]
        seen = torch.cat([x, x]) if both else x
        out = self.predict(seen, k.to(x.device).expand(len(seen)), condition, sizes.expand(len(seen), 6))
        if not both:
            return out
        good, lesser = out.chunk(2)
        return guide.sharpen(good, lesser, x, self._data_prediction(float(k)) if how.kind == "apg" else None)

    def _data_prediction(self, timestep: float) -> Any:
        """Return p and q of a time: the data prediction is p times what the network sees plus q times what it gives."""
        point = self.clock._point(inside(timestep / 1000))
        return 1 / point.gauge - point.frame * point.of_sample, -point.frame * point.of_output

    @property
    def guidance_scale(self) -> float:
        """Return the guidance scale of the call that runs."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the call that runs."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` from a callback to end with what is there."""
        return self._interrupt
