"""What every pipeline of this package does around its transformer: the state of a call, its checks, its noise and
timesteps, the callback of a step, the VAE, and saving with the code. Imports only torch, diffusers, numpy and PIL, and
nothing of this package: bundled code holds its text in place of the pipeline's import of it.
"""

import ast
import contextlib
import copy
import inspect
import json
import operator
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

logger = logging.get_logger(__name__)

PIL_CHANNELS = (1, 3, 4)  # modes L, RGB, RGBA
FLOW_EXAMPLE, EPSILON_EXAMPLE = [1000, 900, 750, 500], [800, 600, 400, 200]  # timesteps of four steps
Callback: TypeAlias = Callable[[Any, int, Any, dict], dict] | PipelineCallback | MultiPipelineCallbacks


@dataclass(eq=False)
class Call:
    """What belongs to one call of a pipeline: calls at once, of one pipeline or of several that share components, each
    have their own.
    """

    guidance_scale: float
    num_timesteps: int = 0
    interrupt: bool = False
    scheduler: SchedulerMixin | None = None  # a copy: schedulers count their steps and keep earlier outputs


_CALLS: ContextVar[Mapping[int, Call]] = ContextVar(
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


class CallMixin:
    """Stands before `DiffusionPipeline` among the bases of a pipeline, whose `__init__` begins its calls with
    [`_begin_calls`].
    """

    _callback_tensor_inputs: Sequence[str]  # "latents", and what conditions them
    _bundled_model: str  # name of the one class of transformer whose file can be bundled
    _token_multiple: int  # of patches: what the sides of the token grid must be a multiple of
    # Of DiffusionPipeline and of the pipeline itself:
    config: Any
    config_name: Any
    maybe_free_model_hooks: Any
    transformer: Any
    vae: Any
    _execution_device: Any

    # ---------------------------------------------------------------- state of a call

    _guidance_scale = _of_call("guidance_scale", "Guidance of the call in progress, which a callback may change.")
    _num_timesteps = _of_call("num_timesteps", "Steps of the call in progress.")
    _interrupt = _of_call("interrupt", "Whether the call in progress is to stop.")

    def _begin_calls(self, guidance_scale: float) -> None:
        """No call yet: what belongs to one has its default."""
        self._last_call = Call(guidance_scale)
        self._running_calls: list[Call] = []

    @property
    def _call(self) -> Call:
        own = _CALLS.get().get(id(self))
        return own if own is not None else (self._running_calls or [self._last_call])[-1]

    @property
    def scheduler(self) -> Any:
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
            call = Call(guidance_scale, scheduler=copy.deepcopy(shared))
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
        """Whether the call in progress runs the transformer with and without its conditioning."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call in progress."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked, by `_interrupt`, to stop."""
        return self._interrupt

    # ---------------------------------------------------------------- checks

    def _check_call(self, output_type: str, callback: Callback | None, names: Sequence[str]) -> Sequence[str]:
        """Names of the tensors that the callback of a call is handed.

        Raises:
            ValueError: a component is missing, or there is no such output type or tensor.
        """
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"This pipeline was made with {name}=None, so it cannot generate images; set pipeline.{name} first."
                )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; it must be 'pil', 'np', 'pt' or 'latent'.")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        names = names or ()
        foreign = [name for name in names if name not in self._callback_tensor_inputs]
        if foreign:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs names {foreign}; the tensors are {self._callback_tensor_inputs}."
            )
        return names

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

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        config, factor = self.transformer.config, self.vae_scale_factor
        # An exported transformer may be made for another size.
        native = config.get("size") or (config.sample_size, config.sample_size)
        unit = factor * self._token_multiple * config.patch_size
        sizes = []
        for name, pixels, latents in (("height", height, native[0]), ("width", width, native[1])):
            pixels = latents * factor if pixels is None else pixels
            if pixels < 1 or pixels % unit:
                raise ValueError(f"{name} is {pixels}; it must be a positive multiple of {unit} pixels.")
            sizes.append(pixels // factor)
        return sizes[0], sizes[1]

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

    # ---------------------------------------------------------------- steps

    def _few_steps(self, timesteps: Any, steps: int, guidance_scale: float) -> list[float] | None:
        """What the config holds of `few_step_timesteps`.

        Args:
            steps, guidance_scale: the defaults beside it.

        Raises:
            ValueError: these are no timesteps of the model, or the defaults are not theirs.
        """
        if timesteps is None:
            return None
        last, whole, example = (1000, "", FLOW_EXAMPLE) if self._flow else (999, "whole ", EPSILON_EXAMPLE)
        numbers = isinstance(timesteps, (list, tuple)) and all(
            isinstance(t, (int, float)) and not isinstance(t, bool) and 0 < t <= last and (self._flow or t == int(t))
            for t in timesteps
        )
        if not numbers or not timesteps or any(after >= t for t, after in zip(timesteps, timesteps[1:])):
            raise ValueError(
                f"few_step_timesteps is {timesteps!r:.200}; it must be a list of falling {whole}numbers above 0 and up "
                f"to {last}, such as {example}, or None for a pipeline that was not distilled for few steps."
            )
        if steps != len(timesteps):
            raise ValueError(
                f"few_step_timesteps has {len(timesteps)} timesteps, but default_steps is {steps}; make it "
                f"{len(timesteps)}."
            )
        if guidance_scale > 1:
            raise ValueError(
                f"default_guidance_scale is {guidance_scale}, but a pipeline with few_step_timesteps samples without "
                "guidance; make it 1.0."
            )
        return [float(t) for t in timesteps]

    def _warn_of_few_steps(self, steps: int) -> None:
        """Say once a call what a few-step pipeline was made for, if it is asked for something else."""
        own = self.config.few_step_timesteps
        if own is None:
            return
        asked = [f"num_inference_steps is {steps}"] if steps != len(own) else []
        asked += [f"guidance_scale is {self.guidance_scale:g}"] if self.do_classifier_free_guidance else []
        if asked:
            logger.warning(
                f"This pipeline was distilled for {len(own)} step{'s' * (len(own) > 1)} without guidance, but "
                f"{' and '.join(asked)}; images may be worse. Leave the argument out, or use the pipeline that it was "
                "distilled from."
            )

    @property
    def _flow(self) -> bool:
        """Whether the transformer predicts velocities of flow matching, as all do that say nothing else."""
        config = {} if self.transformer is None else self.transformer.config
        return config.get("prediction_type", "flow_prediction") == "flow_prediction"

    def _few_step_timesteps(self, steps: int) -> list[float] | None:
        """Timesteps of so many steps of a few-step pipeline: its own, or for another number as many evenly spread over
        them and the way from the last to clean data. `None`: the pipeline is another one.

        Raises:
            ValueError: there are not so many whole timesteps.
        """
        own = self.config.few_step_timesteps
        if own is None or steps == len(own):
            return own
        places = np.linspace(0, len(own), steps, endpoint=False)
        found = np.interp(places, np.arange(len(own) + 1), [*own, 0.0])
        found = found if self._flow else found.round()
        if found[-1] <= 0 or (np.diff(found) >= 0).any():
            raise ValueError(
                f"num_inference_steps is {steps}, but this pipeline was distilled for the timesteps "
                f"{', '.join(f'{t:g}' for t in own)}, and there are too few whole ones from the first down; take fewer "
                "steps."
            )
        return found.tolist()

    def _takes_timesteps(self, timesteps: Sequence[float], shift: Mapping[str, float]) -> bool:
        """Set the scheduler to these timesteps; whether it has them then."""
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        given: dict[str, Any] = {"timesteps": [round(t) for t in timesteps]}
        if self._flow:
            given = {"sigmas": np.array(timesteps) / self.scheduler.config.num_train_timesteps}
        if not set(given) <= set(accepted):
            return False
        if "strength" in accepted:  # LCM warns of timesteps that do not begin at 999, but not of a part of a schedule
            given["strength"] = 1 + 1e-6
        try:
            self.scheduler.set_timesteps(**given, **shift, device="cpu")
        except (TypeError, ValueError):  # not with all of its options
            return False
        found = self.scheduler.timesteps.double()  # some cut off what is behind the point
        return len(found) == len(timesteps) and bool((found - torch.tensor(timesteps)).abs().max() <= 1)

    def _set_timesteps(self, steps: int, tokens: int) -> torch.Tensor:
        """Timesteps on the host, where schedulers index their tables by them: on a GPU every step would wait for the
        device otherwise. A few-step pipeline's are those that it was distilled for.

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
        few = self._few_step_timesteps(steps)
        if few is not None and self._takes_timesteps(few, shift):
            return self.scheduler.timesteps
        if few is not None:
            wanted = ", ".join(f"{t:g}" for t in self.config.few_step_timesteps)
            logger.warning(
                f"This pipeline was distilled for the timesteps {wanted}, but {name} with its config cannot be set to "
                f"them: its own {steps} are used, and images may be worse. Take the scheduler that was saved with the "
                "pipeline."
            )
        try:
            self.scheduler.set_timesteps(steps, device="cpu", **shift)
        except TypeError as error:
            raise ValueError(
                f"{name} makes no timesteps with its config ({error}); load the scheduler of this model again."
            ) from error
        except (ValueError, IndexError) as error:  # as PNDM's first three steps need more than it has
            raise ValueError(
                f"{name} makes no schedule of {steps} steps with its config; take another number of steps, or the "
                "scheduler that was saved with the pipeline."
            ) from error
        timesteps = self.scheduler.timesteps
        if not torch.isfinite(timesteps.float()).all():
            raise ValueError(
                f"{name} makes of {steps} steps the timesteps {timesteps.tolist()[:4]} …; they must be finite. Take "
                "another number of steps."
            )
        return timesteps

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

    def _step_arguments(self, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Keyword arguments of the scheduler's step."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"return_dict": False, **({"generator": generator} if takes_generator else {})}

    def _call_back(
        self,
        callback: Callback,
        step: tuple[int, torch.Tensor],
        names: Sequence[str],
        latents: torch.Tensor,
        rows: Callable[[str], torch.Tensor],
        count: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The callback of a step.

        Args:
            step: its index and timestep. names: of the tensors that the callback is handed.
            rows: a copy of the conditioning of a name, in diffusers' order: the `count` conditional rows last.

        Returns:
            the latents, and the rows of every conditioning that the callback changed.
        """
        tensors = {name: latents if name == "latents" else rows(name) for name in names}
        returned = callback(self, *step, tensors) or {}
        changed = {}
        for name in self._callback_tensor_inputs:
            if name == "latents" or name not in returned:
                continue
            after = _changed_rows(name, rows(name), returned[name], count)
            if after is not None:
                changed[name] = after
        return returned.get("latents", latents), changed

    def _output(self, latents: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """What a call returns of its last latents."""
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"After {self.num_timesteps} steps the latents hold NaN or infinite values, though the transformer's "
                f"first output did not: see whether {type(self.scheduler).__name__} is the scheduler (and has the "
                f"config) of this model, and try less guidance than {self.guidance_scale:g}."
            )
        images = latents if output_type == "latent" else postprocess(self.decode(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, C, H, W)` → images `(B, channels, H·f, W·f)` in [0, 1], float32."""
        return VaeImageProcessor.denormalize(latents if self.vae is None else vae_output(self.vae, latents))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers, whose pipelines know no `subfolder` and would load the whole in its place.

        Raises:
            ValueError: a subfolder is given.
        """
        if kwargs.get("subfolder") is not None:
            raise ValueError(
                f"subfolder={kwargs['subfolder']!r} is for components; of a pipeline in a folder give that folder, of "
                "the Hub fetch it first (huggingface_hub.snapshot_download, or edgedit pull hf://org/name/folder OUT)."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in diffusers, which would take over no component whose class is not named in the signature: of a pipeline
        of the same family (of this package, or with bundled code) every one, in the precision that it has.
        """
        alike = getattr(pipeline, "_bundled_model", None) == cls._bundled_model
        if {"dtype", "torch_dtype", "custom_pipeline"} & kwargs.keys() or not alike:
            given = pipeline.components if alike else {}
            return super().from_pipe(pipeline, **{**given, **kwargs})  # type: ignore[misc]
        kwargs.pop("trust_remote_code", None)  # it is for custom_pipeline
        _, names = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        facts = {name: pipeline.config[name] for name in names if name in pipeline.config}
        found: Any = cls(**{**facts, **pipeline.components, **kwargs})
        if "_name_or_path" in pipeline.config:
            found.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        return found

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
            ValueError: the code cannot be bundled: the transformer is another class, or `push_to_hub=True` is given too
                (the upload would precede the code; use the method `push_to_hub`).
        """
        if bundle_code is None:
            bundle_code = type(self).__module__.startswith("diffusers_modules.")
        model_class = type(getattr(self.transformer, "_orig_mod", self.transformer))  # torch.compile wraps the model
        if bundle_code and model_class.__name__ != self._bundled_model:
            raise ValueError(
                f"The code of {model_class.__name__} is not self-contained, so it cannot be bundled; save without "
                "bundle_code, for use with the package installed."
            )
        if bundle_code and getattr(self.transformer, "quantization_method", None) == "edgedit":
            raise ValueError(
                "Only the package edgedit_hf can load quantised weights; call transformer.dequantize(), or save "
                "without bundle_code."
            )
        if bundle_code and kwargs.get("push_to_hub"):
            raise ValueError("With bundle_code, save first and then upload: pipeline.push_to_hub(repo_id).")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not bundle_code:
            return
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        for name, text in bundled_code(type(self), model_class, index).items():
            written = folder / f"{name}.tmp"
            written.write_text(text, encoding="utf-8")
            os.replace(written, folder / name)


def bundled_code(pipeline_class: type, model_class: type, index: Mapping[str, Any]) -> dict[str, str]:
    """The files that a pipeline's folder needs to load where this package is not installed, by name: the code of the
    pipeline and of its transformer, and, last, the index that names it.

    Args:
        index: what the folder's `model_index.json` holds.
    """
    own = next(kind for kind in pipeline_class.__mro__ if "_bundled_model" in vars(kind))
    code, source = Path(inspect.getfile(own)), Path(inspect.getfile(model_class))
    named = {"_class_name": [code.stem, pipeline_class.__name__], "transformer": [source.stem, model_class.__name__]}
    return {
        code.name: _in_one_file(code),
        f"transformer/{source.name}": source.read_text(encoding="utf-8"),
        "model_index.json": json.dumps({**index, **named}, indent=2, sort_keys=True) + "\n",
    }


def _in_one_file(path: Path) -> str:
    """The source of a module with that of its siblings in place of their imports.

    A bundle of several files would not do: diffusers names a module after its repository, and Python finds no sibling
    of a module where that name has a dot (`…/elastic-dit-1.6b`).
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for node in reversed(ast.parse("".join(lines)).body):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            sibling = path.with_name(f"{node.module}.py").read_text(encoding="utf-8")
            lines[node.lineno - 1 : node.end_lineno] = [sibling]
    return "".join(lines)


def whole_number(name: str, value: Any) -> int:
    """An argument that counts something.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} is {value!r}; it must be at least 1, and a whole number.")
    return number


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


def vae_output(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What a VAE makes of latents `(B, C, H, W)`: images `(B, channels, H·f, W·f)`, float32."""
    latents = unscaled(latents, vae.config).to(vae.dtype)
    if "temperal_downsample" in vae.config:  # a video VAE, such as Qwen-Image's: one frame
        return vae.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0].float()
    return vae.decode(latents, return_dict=False)[0].float()


def unscaled(latents: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
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


def postprocess(images: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list:
    """Images `(B, channels, H, W)` in [0, 1] as the output type of a call."""
    if output_type == "pil" and images.shape[1] not in PIL_CHANNELS:
        raise ValueError(f"Images of {images.shape[1]} channels are no PIL images; use output_type 'np' or 'pt'.")
    return VaeImageProcessor().postprocess(images, output_type, do_denormalize=[False] * len(images))
