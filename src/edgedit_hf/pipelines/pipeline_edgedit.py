"""EdgeDiTPipeline: class labels in, images out. One self-contained file: it imports only torch, diffusers, numpy and
PIL.

Works on latents with a VAE and directly on pixels without one, with a learned or a fixed variance, with a
class-conditional or an unconditional transformer, and with every diffusers scheduler that fits what the transformer
predicts.

Shapes: B images, C channels of the latents (of the pixels without a VAE), H × W their size, f the VAE's downsampling
factor (1 without).
"""

import contextlib
import copy
import difflib
import inspect
import json
import math
import operator
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import ConfigMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

Label = int | str
PIL_CHANNELS = (1, 3, 4)  # modes L, RGB, RGBA


@dataclass(eq=False)
class _Call:
    """What belongs to one call of a pipeline: calls at once, of one pipeline or of several that share components, each
    have their own.
    """

    guidance_scale: float
    num_timesteps: int = 0
    interrupt: bool = False
    scheduler: SchedulerMixin | None = None  # a copy: schedulers count their steps and keep earlier outputs


_CALLS: ContextVar[Mapping[int, _Call]] = ContextVar(
    "calls in progress in this context, by the id of their pipeline", default=MappingProxyType({})
)
_SCHEDULERS = threading.Lock()  # while one is copied, or told what a call left


def _of_call(name: str, doc: str) -> property:
    """An attribute of the call in progress in this thread (in a callback, of its call), of the last one outside of
    calls.

    Set outside of calls, such as by the thread of a stop button, it holds for all calls in progress.
    """

    def get(self: Any) -> Any:
        return getattr(self._call, name)

    def put(self: Any, value: Any) -> None:
        own = _CALLS.get().get(id(self))
        for call in (own,) if own is not None else (self._last_call, *self._running_calls):
            setattr(call, name, value)

    return property(get, put, doc=doc)


class EdgeDiTPipeline(DiffusionPipeline):
    r"""
    Class-conditional (or unconditional) image generation with a diffusion transformer.

    Args:
        transformer ([`EdgeDiTTransformer2DModel`]): Predicts the noise, or the velocity ε − x0, of noisy latents; any
        component with the
            same `config` and call, such as one that runs in ONNX Runtime, serves as well.
        scheduler ([`SchedulerMixin`]): A diffusers scheduler whose prediction type is the transformer's.
        vae ([`AutoencoderKL`] or [`AutoencoderTiny`], *optional*): Decodes latents to images. `None`: the transformer
        works on pixels. id2label (`dict[str, str]`, *optional*): Name of every class, by its number as a string;
        several names of one class are
            separated by commas.
        default_steps (`int`, defaults to 50): `num_inference_steps` of a call that gives none.
        default_guidance_scale (`float`, defaults to 4.0): `guidance_scale` of a call that gives none.
        guidance_channels (`int`, *optional*): Only the first so many channels are guided, the others keep the
            conditional prediction. The original DiT and SiT guide 3 of 4 channels, and their published figures are of
            that; diffusers guides all, which is the default.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "class_labels", "prompt_embeds"]
    # Only the .onnx files of a repository without safetensors in transformer/ are meant: with this, downloads do not
    # skip them.
    _is_onnx = True

    def __init__(
        self,
        transformer: ModelMixin | ConfigMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | ConfigMixin | None = None,
        id2label: dict[str, str] | None = None,
        default_steps: int = 50,
        default_guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
    ):
        super().__init__()
        self._last_call = _Call(default_guidance_scale)
        self._running_calls: list[_Call] = []
        if id2label is not None:
            id2label = {str(key): str(name) for key, name in id2label.items()}
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label,
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            guidance_channels=guidance_channels,
        )
        self._check_id2label()

    # ---------------------------------------------------------------- state of a call

    _guidance_scale = _of_call("guidance_scale", "Guidance of the call in progress, which a callback may change.")
    _num_timesteps = _of_call("num_timesteps", "Steps of the call in progress.")
    _interrupt = _of_call("interrupt", "Whether the call in progress is to stop.")

    @property
    def _call(self) -> _Call:
        own = _CALLS.get().get(id(self))
        return own if own is not None else (self._running_calls or [self._last_call])[-1]

    @property
    def scheduler(self) -> SchedulerMixin | None:
        """The scheduler; in a callback, the copy that its call uses. After a call it has the timesteps of that call."""
        own = _CALLS.get().get(id(self))
        return self.__dict__.get("scheduler") if own is None else own.scheduler

    @scheduler.setter
    def scheduler(self, value: SchedulerMixin | None) -> None:
        self.__dict__["scheduler"] = value
        if (own := _CALLS.get().get(id(self))) is not None:
            own.scheduler = value

    @contextlib.contextmanager
    def _own_call(self, guidance_scale: float) -> Iterator[None]:
        """Within it `_guidance_scale`, `_num_timesteps`, `_interrupt` and `scheduler` are this call's own."""
        shared = self.__dict__["scheduler"]  # not that of a call around this one
        with _SCHEDULERS:
            call = _Call(guidance_scale, scheduler=copy.deepcopy(shared))
        self._running_calls.append(call)
        token = _CALLS.set({**_CALLS.get(), id(self): call})
        try:
            yield
        finally:
            _CALLS.reset(token)
            self._running_calls.remove(call)
            self._last_call = call
            with _SCHEDULERS:
                left = {
                    name: vars(call.scheduler)[name]
                    for name in ("timesteps", "sigmas", "num_inference_steps")
                    if name in vars(call.scheduler)
                }
                vars(shared).update(left)
            call.scheduler = None

    @property
    def guidance_scale(self) -> float:
        """Guidance of the call in progress; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call in progress runs the transformer with and without its classes."""
        return self._guidance_scale > 1 and self.transformer.config.num_classes > 0

    @property
    def num_timesteps(self) -> int:
        """Steps of the call in progress."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked, by `_interrupt`, to stop."""
        return self._interrupt

    # ---------------------------------------------------------------- components

    @property
    def vae_scale_factor(self) -> int:
        """Side of the square of pixels that one latent stands for (1 without a VAE)."""
        if self.vae is None:
            return 1
        if "block_out_channels" in self.vae.config:
            return 2 ** (len(self.vae.config.block_out_channels) - 1)
        ratio = getattr(self.vae, "spatial_compression_ratio", None)
        if ratio is None:
            raise ValueError(
                f"The VAE, a {type(self.vae).__name__}, says nothing of how much it downsamples; use another one."
            )
        return ratio

    # ---------------------------------------------------------------- labels

    def _check_id2label(self) -> None:
        if self.transformer is None or not self.config.id2label:
            return
        classes = self.transformer.config.num_classes
        foreign = [key for key in self.config.id2label if not (key.isdecimal() and int(key) < classes)]
        if foreign:
            raise ValueError(
                f"id2label names the class {foreign[0]!r}, but the transformer has the classes 0 … {classes - 1}; "
                "its keys must be those numbers."
            )

    @property
    def labels(self) -> dict[str, list[int]]:
        """Every name of `id2label` and the classes that carry it (ImageNet has two classes named "crane")."""
        names: dict[str, list[int]] = {}
        for key, value in (self.config.id2label or {}).items():
            for name in dict.fromkeys([value.strip(), *(part.strip() for part in value.split(","))]):
                names.setdefault(name, []).append(int(key))
        return names

    def get_label_ids(self, labels: Label | Sequence[Label]) -> list[int]:
        """Class numbers of class numbers or names.

        Raises:
            ValueError: a number is out of range, or a name is unknown or belongs to several classes.
        """
        if (
            isinstance(labels, str)
            or not isinstance(labels, Iterable)
            or (torch.is_tensor(labels) and labels.ndim == 0)
        ):
            labels = [labels]
        self._check_id2label()  # the transformer may have been put in since
        names = self.labels if any(isinstance(label, str) for label in labels) else {}
        return [self._label_id(label, names) for label in labels]

    def _label_id(self, label: Label, names: Mapping[str, list[int]]) -> int:
        classes = self.transformer.config.num_classes
        if isinstance(label, str):
            if not names:
                raise ValueError(
                    f"The label {label!r} is a name, but this pipeline has no id2label; give numbers 0 … {classes - 1}."
                )
            if label not in names:
                near = difflib.get_close_matches(label, names, n=3) or sorted(names)[:3]
                raise ValueError(
                    f"There is no class named {label!r}; the nearest of {len(names)} names are "
                    f"{', '.join(map(repr, near))}."
                )
            if len(names[label]) > 1:
                raise ValueError(f"The name {label!r} belongs to the classes {names[label]}; give the number you mean.")
            return names[label][0]
        try:
            number = operator.index(label.item() if isinstance(label, torch.Tensor) else label)
        except (TypeError, RuntimeError):
            raise ValueError(f"The label {label!r} is neither a class number 0 … {classes - 1} nor a name.") from None
        if not 0 <= number < classes:
            raise ValueError(f"The label {number} is out of range; this model has the classes 0 … {classes - 1}.")
        return number

    # ---------------------------------------------------------------- checks

    def check_scheduler(self) -> None:
        """Raise a ValueError if the scheduler does not integrate what the transformer predicts."""
        wanted = self.transformer.config.prediction_type
        config, name = self.scheduler.config, type(self.scheduler).__name__
        flow_scheduler = name.startswith("FlowMatch")
        given = "flow_prediction" if flow_scheduler else config.get("prediction_type")
        if given != wanted:
            fitting = "FlowMatchEulerDiscreteScheduler" if wanted == "flow_prediction" else "DDIMScheduler"
            states = "states no prediction type" if given is None else f"integrates {given!r}"
            raise ValueError(
                f"The transformer predicts {wanted!r}, but {name} {states}; use one that fits, such as {fitting}."
            )
        if wanted == "flow_prediction" and not (flow_scheduler or config.get("use_flow_sigmas")):
            raise ValueError(
                f"{name} has prediction_type 'flow_prediction' without use_flow_sigmas=True; set it in its config."
            )
        if "sigma_data" in config:
            raise ValueError(f"{name} wants a network with EDM preconditioning, which this transformer is not.")
        learned = str(config.get("variance_type")).startswith("learned")
        if learned and not self.transformer.config.learn_sigma:
            raise ValueError(
                f"{name} has variance_type {config.variance_type!r}, but the transformer was made with "
                "learn_sigma=False; set the scheduler's variance_type to 'fixed_small'."
            )
        if learned and not self._scheduler_takes_variance and self.transformer.config.in_channels > 3:
            # These schedulers cut the prediction to three channels when told of a learned variance.
            raise ValueError(
                f"{name} cannot use variance_type {config.variance_type!r} with {self.transformer.config.in_channels} "
                f"channels; make it with {name}.from_config(config, variance_type=None)."
            )

    @property
    def _scheduler_takes_variance(self) -> bool:
        """Whether the scheduler's step takes the variance channels of DiT beside the noise."""
        learned = str(self.scheduler.config.get("variance_type")).startswith("learned")
        return learned and type(self.scheduler).__name__ in ("DDPMScheduler", "DDPMParallelScheduler")

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        config, factor = self.transformer.config, self.vae_scale_factor
        native = config.get("size") or (
            config.sample_size,
            config.sample_size,
        )  # an exported transformer may be made for another size
        sizes = []
        for name, pixels, latents in (("height", height, native[0]), ("width", width, native[1])):
            pixels = latents * factor if pixels is None else pixels
            if pixels < 1 or pixels % (factor * config.patch_size):
                raise ValueError(
                    f"{name} is {pixels}; it must be a positive multiple of {factor * config.patch_size} pixels."
                )
            sizes.append(pixels // factor)
        return sizes[0], sizes[1]

    def _prepare_labels(self, class_labels: Any, batch_size: int | None, num_images_per_label: int) -> list[int] | int:
        """The class of every image, or their number for an unconditional transformer."""
        classes = self.transformer.config.num_classes
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label is {num_images_per_label}; it must be at least 1.")
        if classes == 0:
            if class_labels is not None:
                raise ValueError(
                    f"The transformer is unconditional (num_classes=0), but class_labels={class_labels!r}; give "
                    "batch_size instead."
                )
            count = (1 if batch_size is None else batch_size) * num_images_per_label
            if count < 1:
                raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
            return count
        if class_labels is None or batch_size is not None:
            raise ValueError(
                f"The transformer has the classes 0 … {classes - 1}: give class_labels, one an image, and no "
                f"batch_size (given: class_labels={class_labels!r}, batch_size={batch_size})."
            )
        labels = [label for label in self.get_label_ids(class_labels) for _ in range(num_images_per_label)]
        if not labels:
            raise ValueError("class_labels is empty; give at least one class number or name.")
        return labels

    def _set_timesteps(self, steps: int, tokens: int) -> torch.Tensor:
        """Timesteps on the host, where schedulers index their tables by them: on a GPU every step would wait for the
        device otherwise.

        Raises:
            ValueError: the scheduler has no schedule of so many steps.
        """
        config, name, shift = self.scheduler.config, type(self.scheduler).__name__, {}
        if config.get("shift_terminal") and steps == 1:
            raise ValueError(
                f"num_inference_steps is 1, but the scheduler's shift_terminal {config.shift_terminal} stretches the "
                f"steps between the first and the last; take at least 2 steps, or {name}.from_config(config, "
                "shift_terminal=None)."
            )
        if config.get("use_dynamic_shifting"):  # as in diffusers' Flux pipeline: linear in the number of tokens
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            shift["mu"] = config.base_shift + slope * (tokens - config.base_image_seq_len)
        try:
            self.scheduler.set_timesteps(steps, device="cpu", **shift)
        except TypeError as error:
            raise ValueError(
                f"{name} makes no timesteps with its config ({error}); load the scheduler of this model again."
            ) from error
        timesteps = self.scheduler.timesteps
        if not torch.isfinite(timesteps.float()).all():
            raise ValueError(
                f"{name} makes of {steps} steps the timesteps {timesteps.tolist()[:4]} …; they must be finite. Take "
                "another number of steps."
            )
        return timesteps

    def _not_finite(self, inputs: Mapping[str, torch.Tensor | None]) -> ValueError:
        """The error of a transformer whose output holds NaN or infinite values: whether an input, a weight or the
        precision is at fault.
        """
        for name, value in inputs.items():
            if value is not None and not torch.isfinite(value).all():
                return ValueError(
                    f"{name} holds NaN or infinite values, so no image can be made of it; give finite values."
                )
        model = self.transformer
        weights = [*model.named_parameters(), *model.named_buffers()] if isinstance(model, torch.nn.Module) else []
        bad = [
            name
            for name, value in weights
            if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all()
        ]
        if bad:
            return ValueError(
                f"{len(bad)} of {len(weights)} weights of the transformer hold NaN or infinite values, the first is "
                f"{bad[0]}; load a checkpoint of before they did, or train again with a lower learning rate."
            )
        dtype = str(getattr(model, "dtype", "an unknown type")).removeprefix("torch.")
        return ValueError(
            "The guided output of the transformer is not finite, though its input and weights are: it overflows in "
            f"{dtype}; use bfloat16 or float32, or less guidance than {self.guidance_scale:g}."
        )

    def prepare_latents(
        self,
        shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Initial noise in float32, scaled as the scheduler wants it. `latents`: standard normal noise to start from
        instead.
        """
        if isinstance(generator, (list, tuple)) and len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators were given for {shape[0]} images; give one, or one an image."
            )
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has the shape {tuple(latents.shape)}; these arguments need {shape}.")
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_label: int = 1,
        batch_size: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images.

        Args:
            class_labels: Class numbers or names, one or a list. `None` only for an unconditional transformer.
            guidance_scale (`float`, *optional*): Classifier-free guidance: uncond + scale · (cond − uncond), both in
                one batch. 1 or less: no guidance, half the work. Default: the pipeline's `default_guidance_scale`.
            num_inference_steps (`int`, *optional*): Denoising steps. Default: the pipeline's `default_steps`.
            generator: One `torch.Generator`, or one an image, which makes every image independent of the rest of its
                batch.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Standard normal noise to start from.
            output_type: `"pil"`, `"np"` (`(B, H·f, W·f, C)` in [0, 1]), `"pt"` (`(B, C, H·f, W·f)` in [0, 1]) or
                `"latent"`.
            return_dict: Whether to return an [`ImagePipelineOutput`] or a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; may return
                changed tensors, and set the pipeline's `_guidance_scale` or, to stop, `_interrupt`. diffusers'
                `SDCFGCutoffCallback` works.
            callback_on_step_end_tensor_inputs: What `tensors` holds: `"latents"`, and `"class_labels"`, the labels of
                the rows that the transformer is given, `(2B,)` with the null class first while there is guidance, else
                `(B,)` (empty for an unconditional transformer); `"prompt_embeds"` is another name of them, which
                diffusers' callbacks ask for.
            num_images_per_label: Images of every label (or, unconditional, a multiple of `batch_size`).
            batch_size (`int`, *optional*): Number of images of an unconditional transformer, default 1.
            height, width (`int`, *optional*): Size in pixels. Default: what the transformer was made for.

        Raises:
            ValueError: an argument does not fit the model; the message quotes both.
        """
        # 1. Check the arguments before any work is done
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"This pipeline was made with {name}=None, so it cannot generate images; set pipeline.{name} first."
                )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; it must be 'pil', 'np', 'pt' or 'latent'.")
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback_on_step_end_tensor_inputs = callback_on_step_end_tensor_inputs or ()
        foreign = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if foreign:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs names {foreign}; the tensors are {self._callback_tensor_inputs}."
            )
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; it must be at least 1.")
        self.check_scheduler()
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale}; it must be finite.")
        generator = list(generator) if isinstance(generator, tuple) else generator
        labels = self._prepare_labels(class_labels, batch_size, num_images_per_label)
        count = labels if isinstance(labels, int) else len(labels)
        channels = self.transformer.config.in_channels
        latent_height, latent_width = self._latent_size(height, width)

        patch, device = self.transformer.config.patch_size, self._execution_device
        with self._own_call(guidance_scale):
            # 2. Noise, timesteps, labels
            timesteps = self._set_timesteps(steps, (latent_height // patch) * (latent_width // patch))
            self._num_timesteps = len(timesteps)
            latents = self.prepare_latents((count, channels, latent_height, latent_width), generator, latents)
            classes = None if isinstance(labels, int) else torch.tensor(labels, device=device)  # [B]
            null = None if classes is None else torch.full_like(classes, self.transformer.config.num_classes)
            step_kwargs = {"return_dict": False}
            if "generator" in inspect.signature(self.scheduler.step).parameters:
                step_kwargs["generator"] = generator
            on_device = timesteps.to(device)
            modulations, guided = None, False

            # 3. Denoise
            with self.progress_bar(total=len(timesteps)) as progress_bar:
                for index, timestep in enumerate(timesteps):
                    if self.interrupt:
                        break
                    if (
                        modulations is None or guided != self.do_classifier_free_guidance
                    ):  # at first, and where a callback has changed them
                        guided = self.do_classifier_free_guidance
                        rows = torch.cat([classes, null]) if guided else classes  # [2B] or [B]
                        modulations = self._modulations(on_device[index:], rows, 2 * count if guided else count)
                    inputs = on_device[index].expand(2 * count if guided else count), rows
                    prediction = self._predict(latents, timestep, inputs, next(modulations), guided)
                    if index == 0 and not torch.isfinite(prediction).all():
                        raise self._not_finite({"latents": latents})
                    latents = self.scheduler.step(prediction, timestep, latents, **step_kwargs)[0]
                    if callback_on_step_end is not None:
                        # In diffusers' order, the unconditional rows first.
                        known = (
                            timestep.new_empty(0)
                            if classes is None
                            else torch.cat([null, classes])
                            if guided
                            else classes
                        )
                        tensors = {
                            name: latents if name == "latents" else known.clone()
                            for name in callback_on_step_end_tensor_inputs
                        }
                        returned = callback_on_step_end(self, index, timestep, tensors) or {}
                        latents = returned.get("latents", latents)
                        for name in ("class_labels", "prompt_embeds"):
                            changed = _changed_rows(name, known, returned[name], count) if name in returned else None
                            if changed is not None:
                                self._check_classes(changed)
                                null, classes = (changed[:count] if guided else null), changed[-count:]
                                modulations = None
                    progress_bar.update()

        if not torch.isfinite(latents).all():
            raise ValueError(
                f"After {self.num_timesteps} steps the latents hold NaN or infinite values, though the transformer's "
                f"first output did not: see whether {type(self.scheduler).__name__} is the scheduler (and has the "
                f"config) of this model, and try less guidance than {self.guidance_scale:g}."
            )

        # 4. Decode
        images = latents if output_type == "latent" else self._postprocess(self.decode(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_classes(self, classes: torch.Tensor) -> None:
        """Raise unless these are classes of the transformer, or its null class."""
        last = self.transformer.config.num_classes
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) <= last:
            raise ValueError(
                f"The callback returned the class labels {classes.tolist()[:8]}; they must be 0 … {last - 1}, or "
                f"{last} for no class."
            )

    def _modulations(
        self, timesteps: torch.Tensor, classes: torch.Tensor | None, rows: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The modulations of every step and row, as keyword arguments of a transformer that can precompute them (none
        otherwise).

        Those of as many steps at a time as their table stays below the weights that make them: see
        [`EdgeDiTTransformer2DModel.precompute_modulation`].
        """
        if not hasattr(self.transformer, "precompute_modulation"):
            for _ in timesteps:
                yield {}
            return
        labels, place = None, torch.zeros(rows, dtype=torch.long, device=timesteps.device)
        if classes is not None:
            labels, place = torch.unique(classes, return_inverse=True)
        chunk = self.transformer.modulation_steps(1 if labels is None else len(labels))
        for start in range(0, len(timesteps), chunk):
            for table in self.transformer.precompute_modulation(timesteps[start : start + chunk], labels):
                yield {"modulation": table[place]}

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        inputs: tuple[torch.Tensor, torch.Tensor | None],
        modulation: Mapping[str, torch.Tensor],
        guided: bool,
    ) -> torch.Tensor:
        """What the scheduler's step takes, in float32: `(B, C, H, W)`, or `(B, 2C, H, W)` with the variance channels.

        Args:
            timestep: the scheduler's, on the host. inputs: timesteps and classes of the transformer's rows, on its
                device.
        """
        sample = latents
        if hasattr(self.scheduler, "scale_model_input"):
            sample = self.scheduler.scale_model_input(sample, timestep)
        sample = torch.cat([sample, sample]) if guided else sample  # [B or 2B, C, H, W]
        output = self.transformer(sample.to(self.transformer.dtype), *inputs, return_dict=False, **modulation)[
            0
        ].float()
        prediction, variance = (
            output.split(latents.shape[1], dim=1) if self.transformer.config.learn_sigma else (output, None)
        )
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + self._guidance_scale * (conditional - unconditional)
            if self.config.guidance_channels is not None:
                unguided = conditional[:, self.config.guidance_channels :]
                prediction = torch.cat([prediction[:, : self.config.guidance_channels], unguided], dim=1)
            variance = None if variance is None else variance.chunk(2)[0]
        if variance is not None and self._scheduler_takes_variance:
            prediction = torch.cat([prediction, variance], dim=1)  # [B, 2C, H, W]
        return prediction

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, C, H, W)` → images `(B, channels, H·f, W·f)` in [0, 1], float32."""
        if self.vae is not None:
            video = "temperal_downsample" in self.vae.config  # a video VAE, such as Qwen-Image's: one frame
            latents = _unscaled(latents, self.vae.config).to(self.vae.dtype)
            images = self.vae.decode(latents.unsqueeze(2) if video else latents, return_dict=False)[0].float()
            latents = images[:, :, 0] if video else images
        return VaeImageProcessor.denormalize(latents)

    @staticmethod
    def _postprocess(images: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list[Image.Image]:
        if output_type == "pil" and images.shape[1] not in PIL_CHANNELS:
            raise ValueError(f"Images of {images.shape[1]} channels are no PIL images; use output_type 'np' or 'pt'.")
        return VaeImageProcessor().postprocess(images, output_type, do_denormalize=[False] * len(images))

    # ---------------------------------------------------------------- saving

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args, bundle_code: bool | None = None, **kwargs
    ) -> None:
        """As in diffusers, and with `bundle_code=True` the folder also holds the code.

        Such a folder loads with `trust_remote_code=True` where this package is not installed (and needs that flag
        everywhere).

        Args:
            bundle_code: Default: `True` for a pipeline whose own code came from such a folder, so that saving it again
                keeps it loadable, else `False`.

        Raises:
            ValueError: the code cannot be bundled: a component is not self-contained, or `push_to_hub=True` is given
                too (the upload would precede the code; use the method `push_to_hub`).
        """
        if bundle_code is None:
            bundle_code = type(self).__module__.startswith("diffusers_modules.")
        if bundle_code:
            model_class = type(
                getattr(self.transformer, "_orig_mod", self.transformer)
            )  # torch.compile wraps the model
            source = Path(inspect.getfile(model_class))
            if model_class.__name__ != "EdgeDiTTransformer2DModel":
                raise ValueError(
                    f"The code of {model_class.__name__} is not self-contained, so it cannot be bundled; "
                    "save without bundle_code, for use with the package installed."
                )
            if getattr(self.transformer, "quantization_method", None) == "edgedit":
                raise ValueError(
                    "Only the package edgedit_hf can load quantised weights; call transformer.dequantize(), or save "
                    "without bundle_code."
                )
            if kwargs.get("push_to_hub"):
                raise ValueError("With bundle_code, save first and then upload: pipeline.push_to_hub(repo_id).")
        super().save_pretrained(save_directory, *args, **kwargs)
        if not bundle_code:
            return
        folder, own = Path(save_directory), Path(__file__)
        shutil.copyfile(own, folder / own.name)
        shutil.copyfile(source, folder / "transformer" / source.name)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index["_class_name"] = [own.stem, type(self).__name__]
        index["transformer"] = [source.stem, model_class.__name__]
        written = folder / f"{self.config_name}.tmp"
        written.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(written, folder / self.config_name)


def _changed_rows(name: str, before: torch.Tensor, after: torch.Tensor, count: int) -> torch.Tensor | None:
    """What a callback made of the rows of conditioning that it was handed; `None` if it left them as they were.

    The last `count` rows are conditional. As diffusers' callbacks that end guidance do, it may return those alone, or
    (whose code is written for one image) only the very last.
    """
    if after.shape[1:] == before.shape[1:] and len(after) in (len(before), count) and len(after) <= len(before):
        rows = before.clone()
        rows[len(rows) - len(after) :] = after
        return None if torch.equal(rows, before) else rows
    if after.shape == before[-1:].shape and torch.equal(after.to(before), before[-1:]):
        return None
    raise ValueError(
        f"The callback returned {name} of shape {tuple(after.shape)}; it was handed {tuple(before.shape)}, of which "
        f"the last {count} rows are conditional: return as many rows, or those alone."
    )


def _unscaled(latents: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """What a VAE decodes, `(B, C, H, W)`, of the latents that the transformer makes: x / scaling + shift, or x · std /
    scaling + mean.
    """
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        if not len(mean) == len(std) == latents.shape[1]:
            raise ValueError(
                f"The VAE has {len(mean)} latents_mean and {len(std)} latents_std for {latents.shape[1]} channels; it "
                "needs one a channel."
            )
        shift, std = (torch.tensor(values, device=latents.device).view(1, -1, 1, 1) for values in (mean, std))
        scale = scale / std
    return latents / scale + shift
