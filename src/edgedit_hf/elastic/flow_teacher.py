"""Large flow-matching pipelines of diffusers as teachers: their velocity ε − x0 and their last layer's tokens for our
x_t and σ.

One adapter a family, chosen by the pipeline's class name ([`FAMILIES`]); each calls its transformer as that pipeline's
`__call__` does (diffusers 0.42.1). All of them integrate dx/dσ with `FlowMatchEulerDiscreteScheduler.step` (x + (σ' −
σ)·output) or, Sana, with `DPMSolverMultistepScheduler.convert_model_output` (x0 = x − σ·output): what they hand to the
scheduler is the velocity ε − x0. Lumina 2 predicts x0 − ε and negates it before the step.

Memory: the transformer's weights, as `transformer_bytes` counts them (Qwen-Image's 20.4 B: 41 GB in bf16, 20 GB in 8
bit, 11.5 GB in 4 bit), and before them its text encoders, which are freed once the captions are encoded.

Shapes: x_t, velocity `(B, C, H, W)` in the latents that the student is trained on (shifted and scaled as the VAE's
config says); σ `(B,)`; features `(B, N, D)`; conditioning: text embeddings `(B, T, D)` and masks `(B, T)`, a pair a
text input of the transformer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import hub
from ..data.latents import is_video, latent_scale
from ..errors import EdgeDiTError
from ..files import ask_nothing, hash_json, weights_hash
from ..models.stored_weights import pipeline_variant
from ..run.outputs import class_name

QUANTIZATIONS = ("none", "8bit", "4bit")
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Conditioning(NamedTuple):
    """What a teacher knows of some captions: embeddings `(B, T_i, D_i)` and masks `(B, T_i)` of the tokens that are
    there, row by row.
    """

    embeds: list[torch.Tensor]
    masks: list[torch.Tensor]

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """The same on another device, embeddings in another precision."""
        return Conditioning([e.to(device, dtype) for e in self.embeds], [m.to(device).bool() for m in self.masks])


class LatentSpace(NamedTuple):
    """What must agree for two networks to see the same latents."""

    channels: int
    downsampling: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


def latent_space(config: Mapping[str, Any] | None, channels: int) -> LatentSpace:
    """The latent space of a VAE of diffusers by its config, or of pixels (`None`) with so many channels."""
    if config is None:
        return LatentSpace(channels, 1)
    scale = latent_scale(config)
    if is_video(config):
        return LatentSpace(config["z_dim"], 2 ** len(config["temperal_downsample"]), *scale)
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return LatentSpace(config["latent_channels"], 2 ** (len(blocks) - 1), *scale)


def _pack(latents: torch.Tensor) -> torch.Tensor:
    # FluxPipeline._pack_latents, QwenImagePipeline._pack_latents: (B, C, H, W) -> (B, H/2·W/2, 4C), channels first
    # within a token
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def _unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


class FlowTeacher:
    """A frozen text-to-image flow transformer with its text encoders; make one with [`FlowTeacher.load`].

    Args:
        pipeline: the loaded pipeline. dtype: precision it computes in. device: where.
        guidance_scale: guided velocities to learn from; 1 is none. Flux.1-dev takes it as an embedding, as in its
            pipeline; the others compute uncond + scale·(cond − uncond).
        name: what messages call it.
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        dtype: torch.dtype,
        guidance_scale: float = 1.0,
        name: str = "teacher",
    ) -> None:
        self.pipeline, self.device, self.dtype, self.guidance_scale, self.name = (
            pipeline,
            torch.device(device),
            dtype,
            guidance_scale,
            name,
        )
        self.transformer = pipeline.transformer.eval().requires_grad_(False)
        self.features: torch.Tensor | None = None
        self._placed = False
        self._null = self._encode_null().to(self.device, dtype)
        self._watch()

    # ---------------------------------------------------------------- loading

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        quantization: str = "none",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        guidance_scale: float = 1.0,
        trust_remote_code: bool = False,
    ) -> FlowTeacher:
        """The teacher in a pipeline folder or Hub repository. Only its descriptions are read before it is known to be
        usable.

        Args:
            quantization: of the transformer's linear layers by bitsandbytes: `none`, `8bit` (LLM.int8) or `4bit` (NF4);
                needs a CUDA GPU.
            device, dtype: where and in which precision it computes. guidance_scale: see the class.
            trust_remote_code: whether code in the repository may run.

        Raises:
            EdgeDiTError: no pipeline is there, it is not one of [`FAMILIES`], its scheduler is not a flow's, or there
                is no GPU to quantise on.
        """
        from diffusers import DiffusionPipeline

        check_quantization(quantization)
        family = FAMILIES[teacher_family(path_or_id)]
        folder = hub.pipeline_folder(path_or_id)
        options: dict[str, Any] = {
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "vae": None,
        }  # [`check_latents`] reads its config
        if quantization != "none":
            options["quantization_config"] = _quantization_config(quantization, dtype)
        try:
            with ask_nothing(trust_remote_code):
                pipeline = DiffusionPipeline.from_pretrained(str(folder), variant=pipeline_variant(folder), **options)
        # diffusers, transformers and safetensors each have their own, without a common base
        except Exception as error:
            raise EdgeDiTError(f"The teacher {path_or_id} cannot be loaded: {' '.join(str(error).split())}") from error
        return family(pipeline, torch.device(device), dtype, guidance_scale, str(path_or_id))

    def _watch(self) -> None:
        # In every family `norm_out` stands right behind the last layer, and Flux and AuraFlow have cut the text tokens
        # off by then.
        self.transformer.norm_out.register_forward_pre_hook(
            lambda module, arguments: setattr(self, "features", arguments[0])
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of its transformer's weights, and so of what it teaches."""
        return weights_hash(self.transformer.state_dict())

    @functools.cached_property
    def text_fingerprint(self) -> str:
        """Hash of what makes its conditioning; ask for it before the encoders are freed."""
        parts = [part for name in TEXT_PARTS if (part := getattr(self.pipeline, name, None)) is not None]
        return hash_json(
            [type(self.pipeline).__name__, str(self.dtype), [weights_hash(part.state_dict()) for part in parts]]
        )

    @property
    def config(self) -> Any:
        """The pipeline's."""
        return self.pipeline.config

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.transformer.config.in_channels

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim

    def check_shapes(self, shapes: Iterable[Sequence[int]]) -> None:
        """Raise unless the teacher takes latents of these shapes `(C, H, W)`: it is tried, on one each."""
        half = torch.full((1,), 0.5)
        for shape in shapes:
            try:
                self.velocity(torch.zeros(1, *shape), half, self._null)
            except (ValueError, RuntimeError) as error:
                raise EdgeDiTError(
                    f"The teacher {self.name} does not take latents of shape {tuple(shape)}: "
                    f"{' '.join(str(error).split())}; change data.resolution or data.buckets, or give another teacher."
                ) from error

    # ---------------------------------------------------------------- text

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | list[str], device: Any = None, max_sequence_length: int | None = None
    ) -> Conditioning:
        """Conditioning of captions by the teacher's own text encoders, as its pipeline makes it; the same call as our
        pipeline's.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        parts = [part for name in TEXT_PARTS if (part := getattr(self.pipeline, name, None)) is not None]
        if not parts:
            raise EdgeDiTError(f"The teacher {self.name} has no text encoders (any more), so it cannot read captions.")
        for part in parts:
            part.to(self.device)
        return self._encode(
            prompts, {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        )

    def free_text_encoders(self) -> None:
        """Drop the text encoders: from here on conditioning comes from a cache."""
        for name in TEXT_PARTS:
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)

    def _encode(self, prompts: list[str], options: dict[str, Any]) -> Conditioning:
        raise NotImplementedError

    def _encode_null(self) -> Conditioning:
        return self.encode_prompt([""])

    def _condition(self, conditioning: Any, unconditional: torch.Tensor | None, batch: int) -> Conditioning:
        """The rows' conditioning, or that of the empty caption where `unconditional` `(B,)` says so; on the device."""
        given = Conditioning(*conditioning).to(self.device, self.dtype)
        if unconditional is None or not unconditional.any():
            return given
        rows, embeds, masks = unconditional.to(self.device), [], []
        for embed, mask, null, null_mask in zip(*given, *self._null):
            length = max(embed.shape[1], null.shape[1])
            embed, null = (F.pad(e, (0, 0, 0, length - e.shape[1])) for e in (embed, null))
            mask, null_mask = (F.pad(m, (0, length - m.shape[1])) for m in (mask, null_mask))
            embeds.append(torch.where(rows[:, None, None], null, embed))
            masks.append(torch.where(rows[:, None], null_mask, mask))
        return Conditioning(embeds, masks)

    # ---------------------------------------------------------------- velocity

    @torch.no_grad()
    def velocity(
        self,
        x_t: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: Conditioning | Any,
        unconditional: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ε − x0 in float32 on the device of `x_t`; `features` then holds the last layer's tokens of the (conditional)
        call.

        Args:
            x_t: `(B, C, H, W)`. sigma: `(B,)`, 1 is noise. conditioning: rows of what [`FlowTeacher.encode_prompt`]
                gave.
            unconditional: `(B,)` bool: rows that see the empty caption instead, unguided (the student's dropped text).
        """
        if not self._placed:
            self.transformer.to(self.device)
            self._placed = True
        x, sigma = x_t.to(self.device, self.dtype), sigma.to(self.device, torch.float32)
        condition = self._condition(conditioning, unconditional, len(x))
        guidance = torch.full_like(sigma, self.guidance_scale)
        if unconditional is not None:
            guidance = torch.where(unconditional.to(self.device), torch.ones_like(guidance), guidance)
        with torch.autocast(self.device.type, enabled=False):
            output = self._predict(x, sigma, condition, guidance)
            if self.guidance_scale != 1 and not self.transformer.config.get("guidance_embeds"):
                features = self.features
                null = Conditioning(*([part.expand(len(x), *part.shape[1:]) for part in parts] for parts in self._null))
                output = self._guide(output, self._predict(x, sigma, null, guidance))
                self.features = features
        return output.to(x_t.device, torch.float32)

    def _predict(
        self, x: torch.Tensor, sigma: torch.Tensor, condition: Conditioning, guidance: torch.Tensor
    ) -> torch.Tensor:
        raise NotImplementedError

    def _guide(self, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        return uncond + self.guidance_scale * (cond - uncond)


def _short(value: Any) -> str:
    return str(value) if not isinstance(value, tuple) or len(value) <= 4 else f"({', '.join(map(str, value[:3]))}, …)"


def _all_there(*embeds: torch.Tensor) -> Conditioning:
    return Conditioning(list(embeds), [torch.ones(e.shape[:2], dtype=torch.bool, device=e.device) for e in embeds])


# -------------------------------------------------------------------- families


class StableDiffusion3Teacher(FlowTeacher):
    """Stable Diffusion 3 and 3.5. The timestep is 1000·σ; padding is attended to."""

    def _encode(self, prompts, options):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, self.device, do_classifier_free_guidance=False, **options
        )
        return _all_there(embeds, pooled[:, None])

    def _predict(self, x, sigma, condition, guidance):
        embeds, pooled = condition.embeds
        return self.transformer(x, embeds, pooled[:, 0], sigma * 1000, return_dict=False)[0]


class FluxTeacher(FlowTeacher):
    """FLUX.1 dev (guidance as an embedding) and schnell. Packed 2 × 2 latents, timestep σ; padding is attended to."""

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels // 4

    def _encode(self, prompts, options):
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, **options)
        return _all_there(embeds, pooled[:, None])

    def _predict(self, x, sigma, condition, guidance):
        height, width = x.shape[-2:]
        embeds, pooled = condition.embeds
        output = self.transformer(
            hidden_states=_pack(x),
            timestep=sigma,
            guidance=guidance if self.transformer.config.guidance_embeds else None,
            pooled_projections=pooled[:, 0],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=self.pipeline._prepare_latent_image_ids(len(x), height // 2, width // 2, x.device, x.dtype),
            return_dict=False,
        )[0]
        return _unpack(output, height, width)


class QwenImageTeacher(FlowTeacher):
    """Qwen-Image, the teacher of SnapGen++. Packed 2 × 2 latents, timestep σ; guided velocities keep the conditional
    one's norm a token.
    """

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels // 4

    def _encode(self, prompts, options):
        embeds, mask = self.pipeline.encode_prompt(prompts, device=self.device, **options)
        return _all_there(embeds) if mask is None else Conditioning([embeds], [mask.bool()])

    def _predict(self, x, sigma, condition, guidance):
        height, width = x.shape[-2:]
        (embeds,), (mask,) = condition
        length = max(int(mask.sum(1).max()), 1)
        embeds, mask = embeds[:, :length], mask[:, :length]
        output = self.transformer(
            hidden_states=_pack(x),
            timestep=sigma,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=None if mask.all() else mask.long(),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return _unpack(output, height, width)

    def _guide(self, cond, uncond):
        height, width = cond.shape[-2:]
        cond, guided = _pack(cond), _pack(super()._guide(cond, uncond))
        return _unpack(guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), height, width)


class SanaTeacher(FlowTeacher):
    """Sana (flow-matching DPM-Solver). The timestep is 1000·σ, times `timestep_scale`; captions get the pipeline's own
    instruction.
    """

    def _encode(self, prompts, options):
        instruction = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            False,
            device=self.device,
            complex_human_instruction=instruction if any(prompts) else None,
            **options,
        )
        return Conditioning([embeds], [mask.bool()])

    def _predict(self, x, sigma, condition, guidance):
        (embeds,), (mask,) = condition
        output = self.transformer(
            x,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=sigma * 1000 * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]  # without a learned variance


class AuraFlowTeacher(FlowTeacher):
    """AuraFlow. Timestep σ; embeddings of padding are zero and attended to."""

    def _encode(self, prompts, options):
        return _all_there(
            self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device, **options)[0]
        )

    def _predict(self, x, sigma, condition, guidance):
        return self.transformer(x, encoder_hidden_states=condition.embeds[0], timestep=sigma, return_dict=False)[0]


class Lumina2Teacher(FlowTeacher):
    """Lumina Image 2. Its time runs from noise (0) to image (1) and its output is x0 − ε: both are turned round here,
    as in its pipeline.
    """

    @property
    def feature_dim(self) -> int:
        return self.transformer.config.hidden_size

    def _encode(self, prompts, options):
        # The empty caption of guidance comes without the system prompt.
        arguments = {"device": self.device, "do_classifier_free_guidance": False, **options}
        if any(prompts):
            embeds, mask, _, _ = self.pipeline.encode_prompt(prompts, **arguments)
        else:
            embeds, mask = self.pipeline._get_gemma_prompt_embeds(prompts, device=self.device, **options)
        return Conditioning([embeds], [mask.bool()])

    def _predict(self, x, sigma, condition, guidance):
        (embeds,), (mask,) = condition
        output = self.transformer(
            hidden_states=x,
            timestep=1 - sigma,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask.long(),
            return_dict=False,
        )[0]
        # Text and image stand in one sequence, every row's image right behind its own text.
        tokens = x.shape[-2] * x.shape[-1] // self.transformer.config.patch_size**2
        self.features = torch.stack(
            [row[start : start + tokens] for row, start in zip(self.features, mask.sum(1).tolist())]
        )
        return -output


class ElasticDiTTeacher(FlowTeacher):
    """A wider or better trained elastic net of ours, at full width. No text at all is its empty caption."""

    def _watch(self) -> None:
        self.full = self.transformer.subnet_names[-1] if self.transformer.subnet_names else None

    @property
    def feature_dim(self) -> int:
        return self.transformer.hidden_size

    def _encode(self, prompts, options):
        embeds, masks = self.pipeline.encode_prompt(prompts, device=self.device, **options)
        null = self._no_text(len(prompts))
        given = zip(embeds, masks, *null)
        return Conditioning(*map(list, zip(*((n, m) if e is None else (e, mask) for e, mask, n, m in given))))

    def _no_text(self, batch: int) -> Conditioning:
        dims = self.transformer.config.text_dims
        return Conditioning(
            [torch.zeros(batch, 1, dim, device=self.device) for dim in dims],
            [torch.zeros(batch, 1, dtype=torch.bool, device=self.device) for _ in dims],
        )

    def _encode_null(self):
        return self._no_text(1)

    def _predict(self, x, sigma, condition, guidance):
        embeds = [
            e if e.shape[1] else None for e in condition.embeds
        ]  # an encoder that the teacher has not has no tokens in a text table
        output = self.transformer(x, sigma * 1000, embeds, condition.masks, return_features=True, subnet=self.full)
        self.features = output.features
        return output.sample


FAMILIES: dict[str, type[FlowTeacher]] = {
    "StableDiffusion3Pipeline": StableDiffusion3Teacher,
    "FluxPipeline": FluxTeacher,
    "QwenImagePipeline": QwenImageTeacher,
    "SanaPipeline": SanaTeacher,
    "AuraFlowPipeline": AuraFlowTeacher,
    "Lumina2Pipeline": Lumina2Teacher,
    "ElasticDiTPipeline": ElasticDiTTeacher,
}
"""The adapter of every pipeline class that can teach."""


# -------------------------------------------------------------------- before anything is loaded


def check_quantization(quantization: str, key: str = "knowledge.quantization") -> None:
    """Raise unless this machine can quantise so; `key` of the recipe asks for it."""
    if quantization not in QUANTIZATIONS:
        raise EdgeDiTError(f"The quantisation is {quantization!r}; it must be one of {', '.join(QUANTIZATIONS)}.")
    if quantization != "none" and not torch.cuda.is_available():
        raise EdgeDiTError(
            f"A {quantization} teacher needs a CUDA GPU (bitsandbytes), and none is here; set {key} to none."
        )


def _quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers import PipelineQuantizationConfig

    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})


def teacher_family(path_or_id: str | Path) -> str:
    """The pipeline class in a folder or Hub repository, from its descriptions alone.

    Raises:
        EdgeDiTError: no pipeline is there, it is none of [`FAMILIES`], or its scheduler does not integrate a flow.
    """
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    try:
        folder = str(hub.pipeline_folder(path_or_id, described=True))
        index = DiffusionPipeline.load_config(folder)
    except (OSError, ValueError) as error:
        raise EdgeDiTError(
            f"There is no pipeline in {path_or_id} ({' '.join(str(error).split())[:200]}); give a pipeline folder or a "
            "Hub id (organisation/name)."
        ) from error
    name = class_name(index)
    if name not in FAMILIES:
        raise EdgeDiTError(
            f"The teacher {path_or_id} is a {name}; it must be a flow pipeline that is known here: "
            f"{', '.join(FAMILIES)}."
        )
    scheduler = str(index.get("scheduler", ["", ""])[1])
    config = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler")
    if not (scheduler.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"):
        raise EdgeDiTError(
            f"The teacher {path_or_id} has a {scheduler} with prediction_type {config.get('prediction_type')!r}, which "
            "integrates no flow; give a flow-matching checkpoint (FlowMatchEulerDiscreteScheduler, or prediction_type "
            "'flow_prediction')."
        )
    return name


def check_latents(path_or_id: str | Path, vae: Any, channels: int) -> None:
    """Raise unless a teacher sees the latent space of a student on the latents of this VAE (`None`: on pixels of so
    many channels).

    Two autoencoders with the same config but other weights are not told apart.
    """
    from diffusers import AutoencoderKL, DiffusionPipeline

    source = str(hub.pipeline_folder(path_or_id, described=True))
    if (DiffusionPipeline.load_config(source).get("vae") or [None])[0] is None:
        config, own = None, AutoencoderKL.load_config(source, subfolder="transformer")["in_channels"]
    else:
        config, own = AutoencoderKL.load_config(source, subfolder="vae"), channels
    theirs, ours = latent_space(config, own), latent_space(None if vae is None else vae.config, channels)
    for field, value, wanted in zip(LatentSpace._fields, theirs, ours):
        if value != wanted:
            remedy = (
                "take a teacher without a VAE" if vae is None else "set data.vae to the teacher's VAE (its folder vae)"
            )
            raise EdgeDiTError(
                f"The teacher {path_or_id} has another latent space: {field} is {_short(value)} there and "
                f"{_short(wanted)} for the student; {remedy} or give another teacher."
            )


def transformer_bytes(path_or_id: str | Path, quantization: str = "none", bytes_a_weight: int = 2) -> int:
    """Bytes of a teacher's transformer, from its config on this machine: `bytes_a_weight` a parameter, or of the
    weights of linear layers 1 (8 bit), or 0.5 and a float32 scale for every 64 (NF4).

    Raises:
        OSError: the teacher is not here.
    """
    import diffusers

    from ..models.transformer_edgedit import EdgeDiTTransformer2DModel
    from ..models.transformer_elastic_dit import ElasticDiTTransformer2DModel

    folder = str(hub.here(path_or_id, "model_index.json") or path_or_id)
    name = diffusers.DiffusionPipeline.load_config(folder, local_files_only=True)["transformer"][1]
    ours = {kind.__name__: kind for kind in (EdgeDiTTransformer2DModel, ElasticDiTTransformer2DModel)}
    kind = ours.get(name) or getattr(diffusers, name)
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(folder, subfolder="transformer", local_files_only=True))
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    rest = sum(parameter.numel() for parameter in model.parameters()) - linear
    return int(rest * bytes_a_weight + linear * {"none": bytes_a_weight, "8bit": 1, "4bit": 0.5 + 4 / 64}[quantization])
