"""ElasticDiTPipeline: prompts in, images out, at any width of the elastic transformer. Self-contained: it imports only
torch, diffusers, numpy and, beside it, what every pipeline does.

Works on latents with a VAE and directly on pixels without one, with one or both text encoders of the transformer or
with prompt embeds alone, and with every diffusers scheduler for flow matching.

Shapes: B images, C channels of the latents (of the pixels without a VAE), H × W their size, f the VAE's downsampling
factor (1 without), T_i tokens of text encoder i and D_i their width.
"""

import inspect
import math
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, get_class_obj_and_candidates
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from .call import Callback, CallMixin, whole_number

logger = logging.get_logger(__name__)

# Embeds [B, T_i, D_i] and masks [B, T_i], one entry an encoder.
Text = tuple[list[torch.Tensor | None], list[torch.Tensor | None]]
TEXT_TENSORS = ("prompt_embeds", "prompt_embeds_2")  # what a callback calls the hidden states of the text encoders
# Options of diffusers' from_pretrained that bear on how the transformer is loaded, and those that do not.
LOADED_WITH: tuple[str, ...] = (
    "torch_dtype",
    "dtype",
    "variant",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "low_cpu_mem_usage",
)
LOADED_WITH += ("use_safetensors", "disable_mmap", "quantization_config", "trust_remote_code")
LOADED_ASIDE: tuple[str, ...] = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "mirror",
    "custom_pipeline",
    "custom_revision",
)
LOADED_ASIDE += (
    "provider",
    "sess_options",
    "provider_options",
    "use_onnx",
    "load_connected_pipeline",
    "output_loading_info",
)
_TOKENIZERS = threading.Lock()  # a tokenizer keeps the truncation of a call on itself


# diffusers' LoRA loading is a mixin a model family; Sana's is the one that assumes nothing but a component named
# `transformer`.
class ElasticDiTPipeline(CallMixin, DiffusionPipeline, SanaLoraLoaderMixin):
    r"""
    Text-to-image generation with an elastic diffusion transformer.

    Args:
        transformer ([`ElasticDiTTransformer2DModel`]): Predicts the velocity ε − x0 of noisy latents.
        scheduler ([`SchedulerMixin`]): A diffusers scheduler for flow matching, such as
        [`FlowMatchEulerDiscreteScheduler`]. vae ([`AutoencoderKL`], [`AutoencoderTiny`], … *optional*): Decodes latents
        to images. `None`: the transformer works on pixels.
        text_encoder, tokenizer (*optional*): The first text encoder, whose hidden size is
            `transformer.config.text_dims[0]`: a text model of transformers. CLIP-type: the normed last hidden state, a
            prompt longer than its window in several windows. T5-type encoders
            and decoders such as Gemma: the last hidden state of at most `max_sequence_length` tokens.
        text_encoder_2, tokenizer_2 (*optional*): The same for `text_dims[1]`. A missing encoder is one whose text was
            dropped in training.
        default_steps (`int`, defaults to 28): `num_inference_steps` of a call that gives none.
        default_guidance_scale (`float`, defaults to 4.0): `guidance_scale` of a call that gives none.
        max_sequence_length (`int`, defaults to 128): Tokens of a prompt, for text encoders that are not CLIP-type.
        few_step_timesteps (`list[float]`, *optional*): Of a pipeline that was distilled for few steps without guidance:
            its timesteps, falling, on the scale 0 … 1000 (1000 is noise), as many as `default_steps`. The last step
            goes to clean data.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    _callback_tensor_inputs = ["latents", *TEXT_TENSORS]
    _bundled_model = "ElasticDiTTransformer2DModel"
    _token_multiple = 2  # the Middle stage halves the token grid
    # Only the .onnx files of a repository without safetensors in transformer/ are meant: with this, downloads do not
    # skip them.
    _is_onnx = True

    def __init__(
        self,
        transformer: ModelMixin | ConfigMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | ConfigMixin | None = None,
        text_encoder: torch.nn.Module | ConfigMixin | None = None,
        tokenizer: Any = None,
        text_encoder_2: torch.nn.Module | ConfigMixin | None = None,
        tokenizer_2: Any = None,
        default_steps: int = 28,
        default_guidance_scale: float = 4.0,
        max_sequence_length: int = 128,
        few_step_timesteps: list[float] | None = None,
    ):
        super().__init__()
        self._begin_calls(default_guidance_scale)
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            max_sequence_length=max_sequence_length,
            few_step_timesteps=self._few_steps(few_step_timesteps, default_steps, default_guidance_scale),
        )
        self._check_text_encoders()
        self._check_vae()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *, subnet: str | None = None, **kwargs):
        """As in diffusers, and with `subnet` the transformer is that sub-network alone: only its slice of the weights
        is read. (The base class's `DiffusionPipeline.from_pretrained` knows no `subnet`: it warns, and loads the whole
        net.) Every other option means what it means without.

        Raises:
            ValueError: there is no such sub-network, `transformer` is given too, or an option that cannot be combined
                with `subnet`.
        """
        if subnet is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "transformer" in kwargs:
            raise ValueError(
                f"subnet={subnet!r} says which part of the saved transformer to load, so no transformer can be given."
            )
        others = {name for name, value in kwargs.items() if value is not None and value is not False}
        others -= {*LOADED_WITH, *LOADED_ASIDE, *inspect.signature(cls.__init__).parameters}
        if kwargs.get("device_map") == "balanced":
            others.add("device_map='balanced'")
        if others:
            raise ValueError(
                f"subnet={subnet!r} cannot be combined with {', '.join(sorted(others))}. Load the sub-network with "
                "ElasticDiTTransformer2DModel.from_pretrained(…, subfolder='transformer', subnet=…), and give it as "
                "transformer=."
            )
        folder = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(folder):
            folder = cls.download(folder, **kwargs)
        given = {name: kwargs[name] for name in LOADED_WITH if kwargs.get(name) is not None}
        dtype = given.pop("dtype", None) or given.pop("torch_dtype", None)
        if isinstance(dtype, dict):
            dtype = dtype.get("transformer", dtype.get("default"))
        if dtype is not None:
            given["torch_dtype"] = dtype
        if "quantization_config" in given:
            config = given.pop("quantization_config")
            if not isinstance(config, PipelineQuantizationConfig):
                raise ValueError(
                    f"quantization_config is a {type(config).__name__}; a pipeline takes a "
                    "PipelineQuantizationConfig(quant_mapping=…)."
                )
            config = config._resolve_quant_config(is_diffusers=True, module_name="transformer")
            given |= {} if config is None else {"quantization_config": config}
        saved, trust = os.path.join(folder, "transformer"), given.pop("trust_remote_code", False)
        if "variant" in given and not any(f".{given['variant']}" in name for name in os.listdir(saved)):
            del given["variant"]  # as diffusers: a variant of the components that have it
        library, name = cls.load_config(folder)["transformer"]
        where = {"component_name": "transformer", "cache_dir": folder, "trust_remote_code": trust}
        model_class, _ = get_class_obj_and_candidates(library, name, ALL_IMPORTABLE_CLASSES, None, False, **where)
        transformer = model_class.from_pretrained(saved, subnet=subnet, **given)
        if not os.path.isfile(os.path.join(saved, f"{library}.py")):
            return super().from_pretrained(pretrained_model_name_or_path, transformer=transformer, **kwargs)
        pipeline = super().from_pretrained(
            pretrained_model_name_or_path, transformer=None, **kwargs
        )  # diffusers looks for a given one's code in a library
        pipeline.register_modules(transformer=transformer)
        pipeline._check_text_encoders()
        pipeline._check_vae()
        return pipeline

    # ---------------------------------------------------------------- components

    def _encoders(self) -> list[tuple[str, Any, Any]]:
        """(name, text encoder, tokenizer) of each width in the transformer's `text_dims`; `None` where there is
        none.
        """
        encoders = [
            ("text_encoder", self.text_encoder, self.tokenizer),
            ("text_encoder_2", self.text_encoder_2, self.tokenizer_2),
        ]
        if self.transformer is None:
            return encoders
        count = len(self.transformer.config.text_dims)
        return (encoders + [(f"text_encoder_{i + 1}", None, None) for i in range(2, count)])[:count]

    def _check_text_encoders(self) -> None:
        pairs = [("text_encoder", self.text_encoder, "tokenizer", self.tokenizer)]
        pairs.append(("text_encoder_2", self.text_encoder_2, "tokenizer_2", self.tokenizer_2))
        dims = None if self.transformer is None else self.transformer.config.text_dims
        for index, (name, encoder, tokenizer_name, tokenizer) in enumerate(pairs):
            if (encoder is None) != (tokenizer is None):
                there, missing = (name, tokenizer_name) if tokenizer is None else (tokenizer_name, name)
                raise ValueError(f"There is a {there} without a {missing}; give both, or neither.")
            if encoder is None:
                continue
            if dims is not None and index >= len(dims):
                raise ValueError(
                    f"There is a {name}, but the transformer takes the text of {len(dims)} (text_dims is {list(dims)})."
                )
            width = getattr(encoder.config.get_text_config(), "hidden_size", None)
            if dims is not None and width is not None and width != dims[index]:
                raise ValueError(
                    f"The hidden size of {name} is {width}, but the transformer takes {dims[index]} "
                    f"(text_dims[{index}]); use the text encoder that the transformer was trained with."
                )
            # Some tokenizers have a few added tokens that the text model does not know and prompts do not contain
            # (Gemma 3).
            _check_vocabulary(name, tokenizer.vocab_size, encoder)

    def _check_vae(self) -> None:
        if self.vae is None or self.transformer is None:
            return
        config, channels = self.vae.config, self.transformer.config.in_channels
        latent_channels = config.get("latent_channels", config.get("z_dim"))
        if latent_channels != channels:
            raise ValueError(
                f"The VAE has {latent_channels} latent channels, but the transformer takes {channels}; use the one it "
                "was trained with."
            )
        _ = self.vae_scale_factor

    def check_scheduler(self) -> None:
        """Raise a ValueError if the scheduler does not integrate velocities of flow matching."""
        config, name = self.scheduler.config, type(self.scheduler).__name__
        if name.startswith("FlowMatch") or (
            config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
        ):
            return
        raise ValueError(
            f"The transformer predicts 'flow_prediction', but {name} (prediction_type "
            f"{config.get('prediction_type')!r}, use_flow_sigmas {config.get('use_flow_sigmas', False)}) does not "
            "integrate it; use one that does, such as FlowMatchEulerDiscreteScheduler."
        )

    def _vae(self) -> ModelMixin:
        if self.vae is None:
            raise ValueError("This pipeline has no VAE: its transformer works on pixels.")
        return self.vae

    def enable_vae_tiling(self) -> None:
        """Decode large images in tiles, with less memory (`pipeline.vae.enable_tiling()`)."""
        self._vae().enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Undo [`enable_vae_tiling`]."""
        self._vae().disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode a batch image by image, with less memory (`pipeline.vae.enable_slicing()`)."""
        self._vae().enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Undo [`enable_vae_slicing`]."""
        self._vae().disable_slicing()

    # ---------------------------------------------------------------- text

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: torch.device | str | None = None,
        max_sequence_length: int | None = None,
    ) -> Text:
        """Hidden states of every text encoder.

        Returns:
            embeds `(B, T_i, D_i)` and masks `(B, T_i)` (bool, true where there is a token), one entry an encoder,
            `None` for a missing one.

        Raises:
            ValueError: the prompts are no strings, there is no text encoder, or a tokenizer does not belong to its
                encoder.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"The prompt is {prompt!r}; it must be a string or a non-empty list of strings.")
        if self.text_encoder is None and self.text_encoder_2 is None:
            raise ValueError("This pipeline has no text encoder, so it cannot read a prompt; give prompt_embeds.")
        device = self._execution_device if device is None else device
        limit = self.config.max_sequence_length if max_sequence_length is None else max_sequence_length
        limit = whole_number("max_sequence_length", limit)
        embeds: list[Any] = []
        masks: list[Any] = []
        for name, encoder, tokenizer in self._encoders():
            states = mask = None
            if encoder is not None:
                with _TOKENIZERS:
                    windows = _windows(tokenizer, encoder.config.get_text_config(), prompts, limit)
                _check_vocabulary(name, 1 + max(max(row, default=0) for rows in windows for row in rows), encoder)
                states, mask = _encode(encoder, windows, tokenizer.pad_token_id or 0, device)
            embeds.append(states)
            masks.append(mask)
        return embeds, masks

    def _given_text(self, what: str, embeds: Any, masks: Any) -> Text:
        """Embeds and masks that the caller gave, checked."""
        dims = self.transformer.config.text_dims
        embeds = [embeds] if torch.is_tensor(embeds) else list(embeds)
        masks = [None] * len(embeds) if masks is None else [masks] if torch.is_tensor(masks) else list(masks)
        if len(embeds) != len(dims) or len(masks) != len(dims):
            raise ValueError(
                f"{what}_embeds has {len(embeds)} entries and {what}_masks {len(masks)}; this transformer needs one "
                f"(or None) for each of its {len(dims)} text encoders."
            )
        rows = {len(states) for states in embeds if states is not None}
        if len(rows) > 1:
            raise ValueError(f"{what}_embeds are of {sorted(rows)} prompts; every text encoder's must be of the same.")
        for index, (states, mask) in enumerate(zip(embeds, masks)):
            if states is None:
                if mask is not None:
                    raise ValueError(
                        f"{what}_masks[{index}] is given without {what}_embeds[{index}]; give both, or neither."
                    )
                continue
            if states.ndim != 3 or states.shape[-1] != dims[index]:
                raise ValueError(
                    f"{what}_embeds[{index}] has the shape {tuple(states.shape)}; the transformer needs (prompts, "
                    f"tokens, {dims[index]}) (text_dims[{index}])."
                )
            if mask is None:
                masks[index] = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            elif mask.shape != states.shape[:2]:
                raise ValueError(
                    f"{what}_masks[{index}] has the shape {tuple(mask.shape)}; {what}_embeds[{index}] needs "
                    f"{tuple(states.shape[:2])}."
                )
        return embeds, masks

    def _text(self, what: str, prompt: Any, embeds: Any, masks: Any, max_sequence_length: int | None) -> Text | None:
        """Text of one branch of guidance from a prompt or from embeds; `None` if neither is given."""
        if prompt is not None and embeds is not None:
            raise ValueError(f"Both {what} and {what}_embeds are given; give one of them.")
        if embeds is not None:
            return self._given_text(what, embeds, masks)
        if masks is not None:
            raise ValueError(f"{what}_masks is given without {what}_embeds.")
        return None if prompt is None else self.encode_prompt(prompt, max_sequence_length=max_sequence_length)

    def _conditioning(self, branches: Sequence[Text], count: int) -> dict[str, Any]:
        """Keyword arguments of the transformer for the branches of guidance below one another: rows `(len(branches) ·
        count, …)`.
        """
        embeds: list[torch.Tensor] = []
        masks: list[torch.Tensor] = []
        for index, width in enumerate(self.transformer.config.text_dims):
            parts = [(branch[0][index], branch[1][index]) for branch in branches]
            length = max((states.shape[1] for states, _ in parts if states is not None), default=0)
            if length == 0:
                embeds.append(None)
                masks.append(None)
                continue
            device = self._execution_device
            states = torch.zeros(len(parts), count, length, width, dtype=self.transformer.dtype, device=device)
            mask = torch.zeros(len(parts), count, length, dtype=torch.bool, device=device)
            for row, (part, valid) in enumerate(parts):
                if part is not None:
                    states[row, :, : part.shape[1]] = part.repeat_interleave(count // len(part), dim=0)
                    mask[row, :, : part.shape[1]] = valid.repeat_interleave(count // len(part), dim=0)
            embeds.append(states.flatten(0, 1))
            masks.append(mask.flatten(0, 1))
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": masks}

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: Sequence[torch.Tensor | None] | None = None,
        prompt_masks: Sequence[torch.Tensor | None] | None = None,
        negative_prompt_embeds: Sequence[torch.Tensor | None] | None = None,
        negative_prompt_masks: Sequence[torch.Tensor | None] | None = None,
        subnet: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images.

        Args:
            prompt: One prompt or a list.
            negative_prompt: What guidance leads away from, one or one a prompt. Default: no text at all, as training
                drops it, which is not the same as the empty prompt `""`.
            height, width (`int`, *optional*): Size in pixels. Default: what the transformer was made for.
            num_inference_steps (`int`, *optional*): Denoising steps. Default: the pipeline's `default_steps`.
            guidance_scale (`float`, *optional*): Classifier-free guidance: uncond + scale · (cond − uncond), both in
                one batch. 1 or less: no guidance, half the work. Default: the pipeline's `default_guidance_scale`.
            num_images_per_prompt: Images of every prompt.
            generator: One `torch.Generator`, or one an image, which makes every image independent of the rest of its
                batch.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Standard normal noise to start from.
            prompt_embeds, prompt_masks: What [`encode_prompt`] returns, instead of a prompt: one entry a text encoder,
                `None` for one that is to be ignored. Without masks every token counts.
            negative_prompt_embeds, negative_prompt_masks: The same instead of a negative prompt.
            subnet (`str`, *optional*): The sub-network to run, for this call alone. Default: the transformer's active
                one as the call begins.
            output_type: `"pil"`, `"np"` (`(B, H·f, W·f, C)` in [0, 1]), `"pt"` (`(B, C, H·f, W·f)` in [0, 1]) or
                `"latent"`.
            return_dict: Whether to return an [`ImagePipelineOutput`] or a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; may return
                changed tensors, and set the pipeline's `_guidance_scale` or, to stop, `_interrupt`. diffusers'
                `SDCFGCutoffCallback` works.
            callback_on_step_end_tensor_inputs: What `tensors` holds: `"latents"`, and `"prompt_embeds"`,
                `"prompt_embeds_2"`, the hidden states of the first and second text encoder in the rows that the
                transformer is given, `(2B, T_i, D_i)` with the negative ones first while there is guidance, else `(B,
                T_i, D_i)` (no tokens where there is no such text).
            max_sequence_length (`int`, *optional*): Tokens of a prompt beyond which text encoders that are not
                CLIP-type cut it.

        Raises:
            ValueError: an argument does not fit the model; the message quotes both.
        """
        # 1. Check the arguments before any work is done
        names = self._check_call(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        steps = self.config.default_steps if num_inference_steps is None else num_inference_steps
        steps = whole_number("num_inference_steps", steps)
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt)
        if prompt is None and prompt_embeds is None:
            raise ValueError("Neither prompt nor prompt_embeds is given; give one of them.")
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale is {guidance_scale}; it must be finite.")
        generator = list(generator) if isinstance(generator, tuple) else generator
        self.check_scheduler()
        channels, patch = self.transformer.config.in_channels, self.transformer.config.patch_size
        latent_height, latent_width = self._latent_size(height, width)

        # 2. Text
        subnet = self.transformer.resolve_subnet(
            subnet
        )  # of this call to its end, whatever other calls and callbacks do
        with self._own_call(guidance_scale):
            text = self._text("prompt", prompt, prompt_embeds, prompt_masks, max_sequence_length)
            negative = self._text(
                "negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_masks, max_sequence_length
            )
            prompts = _rows(text) or 1
            if negative is None:
                negative = ([None] * len(text[0]), [None] * len(text[0]))
            elif _rows(negative) not in (None, 1, prompts):
                raise ValueError(
                    f"There are {_rows(negative)} negative prompts for {prompts} prompts; give one, or one a prompt."
                )

            # 3. Noise and timesteps
            self._warn_of_few_steps(steps)
            count = prompts * num_images_per_prompt
            latents = self.prepare_latents((count, channels, latent_height, latent_width), generator, latents)
            timesteps = self._set_timesteps(steps, (latent_height // patch) * (latent_width // patch))
            self._num_timesteps = len(timesteps)
            on_device = timesteps.to(latents.device)
            step_arguments = self._step_arguments(generator)

            # 4. Denoise
            conditioning: dict[bool, dict[str, Any]] = {}  # of a step with and without guidance; made once
            with self.progress_bar(total=len(timesteps)) as progress_bar:
                for index, timestep in enumerate(timesteps):
                    if self.interrupt:
                        break
                    guided = self.do_classifier_free_guidance
                    if guided not in conditioning:
                        conditioning[guided] = {
                            **self._conditioning([text, negative] if guided else [text], count),
                            "subnet": subnet,
                        }
                    prediction = self._predict(latents, timestep, on_device[index], conditioning[guided], guided)
                    if index == 0 and not torch.isfinite(prediction).all():
                        embeds = conditioning[guided]["encoder_hidden_states"]
                        raise self._not_finite(
                            {"latents": latents, **{f"prompt_embeds[{i}]": states for i, states in enumerate(embeds)}}
                        )
                    latents = self.scheduler.step(prediction, timestep, latents, **step_arguments)[0]
                    if callback_on_step_end is not None:
                        used = conditioning[guided]
                        latents, changed = self._call_back(
                            callback_on_step_end,
                            (index, timestep),
                            names,
                            latents,
                            partial(_swapped, used, count=count),
                            count,
                        )
                        for name, states in changed.items():
                            encoder, rows = TEXT_TENSORS.index(name), used["encoder_attention_mask"]
                            text = _replaced(text, encoder, states[-count:], rows[encoder][:count])
                            if guided:
                                negative = _replaced(negative, encoder, states[:count], rows[encoder][count:])
                            conditioning = {}
                    progress_bar.update()

        # 5. Decode
        return self._output(latents, output_type, return_dict)

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        on_device: torch.Tensor,
        conditioning: dict[str, Any],
        guided: bool,
    ) -> torch.Tensor:
        """Velocity `(B, C, H, W)` in float32. `timestep`: the scheduler's, on the host; `on_device`: the same where the
        model is.
        """
        sample = latents
        if hasattr(self.scheduler, "scale_model_input"):
            sample = self.scheduler.scale_model_input(sample, timestep)
        sample = torch.cat([sample, sample]) if guided else sample  # [B or 2B, C, H, W]
        rows = on_device.expand(len(sample))
        velocity = self.transformer(sample.to(self.transformer.dtype), rows, **conditioning, return_dict=False)[
            0
        ].float()
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + self._guidance_scale * (conditional - unconditional)
        return velocity


def _swapped(conditioning: Mapping[str, Any], name: str, count: int) -> torch.Tensor:
    """Hidden states of a text encoder in diffusers' order: the `count` conditional rows, which the transformer has
    first, last.
    """
    states, index = conditioning["encoder_hidden_states"], TEXT_TENSORS.index(name)
    if index >= len(states) or states[index] is None:
        return torch.empty(0, 0, 0)
    return torch.cat([states[index][count:], states[index][:count]])


def _replaced(text: Text, index: int, states: torch.Tensor, mask: torch.Tensor) -> Text:
    """The text with other hidden states of one encoder."""
    embeds, masks = list(text[0]), list(text[1])
    embeds[index], masks[index] = states, mask
    return embeds, masks


def _rows(text: Text) -> int | None:
    """Number of prompts; `None` if no encoder has text."""
    return next((len(states) for states in text[0] if states is not None), None)


def _check_vocabulary(name: str, needed: int, encoder: Any) -> None:
    there = encoder.get_input_embeddings().num_embeddings
    if needed > there:
        raise ValueError(
            f"The tokenizer of {name} has at least {needed} tokens, but the embedding of {name}, a "
            f"{type(encoder).__name__}, has {there} rows; they do not belong together. "
            "Use the tokenizer saved with the "
            "encoder."
        )


def _windows(tokenizer: Any, config: Any, prompts: Sequence[str], limit: int) -> list[list[list[int]]]:
    """Token ids of every prompt, in as many windows as its encoder needs: CLIP-type several, each with start and end
    token; others one, cut with a warning after `limit` tokens."""
    longest = getattr(config, "max_position_embeddings", None) or limit
    if str(config.model_type).startswith("clip"):
        start, end = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
        room = longest - len(start) - len(end)
        whole = tokenizer(prompts, add_special_tokens=False, verbose=False).input_ids
        return [[start + row[i : i + room] + end for i in range(0, max(len(row), 1), room)] for row in whole]
    limit = min(limit, longest)
    whole = tokenizer(prompts, verbose=False).input_ids
    rows = tokenizer(prompts, truncation=True, max_length=limit).input_ids
    for index, (row, kept) in enumerate(zip(whole, rows)):
        if len(row) > len(kept):
            lost = tokenizer.decode(row[len(kept) - 1 :], skip_special_tokens=True)
            logger.warning(
                f"Prompt {index} has {len(row)} tokens, but max_sequence_length is {limit}: its end is ignored, "
                f"{lost[:80]!r}. Raise max_sequence_length, or shorten the prompt."
            )
    return [[row] for row in rows]


def _encode(
    encoder: Any, windows: Sequence[Sequence[Sequence[int]]], padding: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states `(B, T, D)` of the tokens of every prompt, its windows joined, zero behind them; and their
    mask `(B, T)`.
    """
    flat = [row for rows in windows for row in rows]
    lengths = [len(row) for row in flat]
    width = max(1, *lengths)
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in flat], device=device)  # [windows, tokens]
    valid = torch.arange(width, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    accepted = inspect.signature(encoder.forward).parameters
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if "logits_to_keep" in accepted:  # a language model, whose output is logits
        extra |= {"logits_to_keep": 1, "output_hidden_states": True}
    output = encoder(input_ids=ids, attention_mask=valid.long(), **extra)
    states = output.hidden_states[-1] if "logits_to_keep" in accepted else output.last_hidden_state

    totals = [sum(map(len, rows)) for rows in windows]
    embeds = states.new_zeros(len(windows), max(1, *totals), states.shape[-1])
    mask = torch.arange(embeds.shape[1], device=device) < torch.tensor(totals, device=device).unsqueeze(1)
    first = 0
    for index, rows in enumerate(windows):
        last = first + len(rows)
        embeds[index, : totals[index]] = states[first:last][valid[first:last]]
        first = last
    return embeds, mask
