"""EdgeDiTPipeline: class labels in, images out. Self-contained: it imports only torch, diffusers, numpy and, beside it,
what every pipeline does.

Works on latents with a VAE and directly on pixels without one, with a learned or a fixed variance, with a
class-conditional or an unconditional transformer, and with every diffusers scheduler that fits what the transformer
predicts.

Shapes: B images, C channels of the latents (of the pixels without a VAE), H × W their size, f the VAE's downsampling
factor (1 without).
"""

import difflib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .call import Callback, CallMixin, whole_number

Label = int | str


class EdgeDiTPipeline(CallMixin, DiffusionPipeline):
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
        few_step_timesteps (`list[float]`, *optional*): Of a pipeline that was distilled for few steps without guidance:
            its timesteps, falling, on the model's scale 0 … 1000 (whole numbers below 1000 where it predicts the
            noise), as many as `default_steps`. The last step goes to clean data.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "class_labels", "prompt_embeds"]
    _bundled_model = "EdgeDiTTransformer2DModel"
    _token_multiple = 1
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
        few_step_timesteps: list[float] | None = None,
    ):
        super().__init__()
        self._begin_calls(default_guidance_scale)
        if id2label is not None:
            id2label = {str(key): str(name) for key, name in id2label.items()}
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label,
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            guidance_channels=guidance_channels,
            few_step_timesteps=self._few_steps(few_step_timesteps, default_steps, default_guidance_scale),
        )
        self._check_id2label()

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call in progress runs the transformer with and without its classes."""
        return super().do_classifier_free_guidance and self.transformer.config.num_classes > 0

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
            or (isinstance(labels, torch.Tensor) and labels.ndim == 0)
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

    def _prepare_labels(self, class_labels: Any, batch_size: int | None, num_images_per_label: int) -> list[int] | int:
        """The class of every image, or their number for an unconditional transformer."""
        classes = self.transformer.config.num_classes
        num_images_per_label = whole_number("num_images_per_label", num_images_per_label)
        if classes == 0:
            if class_labels is not None:
                raise ValueError(
                    f"The transformer is unconditional (num_classes=0), but class_labels={class_labels!r}; give "
                    "batch_size instead."
                )
            return whole_number("batch_size", 1 if batch_size is None else batch_size) * num_images_per_label
        if class_labels is None or batch_size is not None:
            raise ValueError(
                f"The transformer has the classes 0 … {classes - 1}: give class_labels, one an image, and no "
                f"batch_size (given: class_labels={class_labels!r}, batch_size={batch_size})."
            )
        labels = [label for label in self.get_label_ids(class_labels) for _ in range(num_images_per_label)]
        if not labels:
            raise ValueError("class_labels is empty; give at least one class number or name.")
        return labels

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
        callback_on_step_end: Callback | None = None,
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
        names = self._check_call(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps
        steps = whole_number("num_inference_steps", steps)
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
            self._warn_of_few_steps(steps)
            timesteps = self._set_timesteps(steps, (latent_height // patch) * (latent_width // patch))
            self._num_timesteps = len(timesteps)
            latents = self.prepare_latents((count, channels, latent_height, latent_width), generator, latents)
            classes = None if isinstance(labels, int) else torch.tensor(labels, device=device)  # [B]
            null = None if classes is None else torch.full_like(classes, self.transformer.config.num_classes)
            step_arguments = self._step_arguments(generator)
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
                    latents = self.scheduler.step(prediction, timestep, latents, **step_arguments)[0]
                    if callback_on_step_end is not None:
                        handed = timestep.new_empty(0) if classes is None else classes
                        latents, changed = self._call_back(
                            callback_on_step_end,
                            (index, timestep),
                            names,
                            latents,
                            partial(_handed_labels, handed, null if guided else None),
                            count,
                        )
                        for labels in changed.values():
                            self._check_classes(labels)
                            null, classes = (labels[:count] if guided else null), labels[-count:]
                            modulations = None
                    progress_bar.update()

        # 4. Decode
        return self._output(latents, output_type, return_dict)

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


def _handed_labels(classes: torch.Tensor, null: torch.Tensor | None, name: str) -> torch.Tensor:
    """A copy of the labels of the transformer's rows in diffusers' order: those of no class, while there is guidance,
    first. (`name`: a callback may ask for them by either of two names.)
    """
    return classes.clone() if null is None else torch.cat([null, classes])
