"""Exported denoisers, with the call signatures of the models that they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from ..errors import EdgeDiTError
from ..models.transformer_edgedit import modulation_steps
from .exported import ExportedComponent
from .parts import MODULATED

CACHED_MODULATIONS = 64  # timesteps whose modulations an elastic denoiser keeps


class ExportedTransformer(ExportedComponent):
    """A denoiser: what both families share. Beside the exported config, `split` says whether the conditioner is a file
    of its own, and `size` holds height and width of the latents (`None`: any)."""

    PARTS: ClassVar[tuple[str, ...]] = ("denoiser", "conditioner")

    @property
    def split(self) -> bool:
        """Whether the modulations come from an artefact of their own."""
        return bool(self.config.get("split"))

    def _check_sample(self, hidden_states: torch.Tensor) -> None:
        self._loaded_folder()
        channels, size = self.config.in_channels, self.config.get("size")
        height, width = size if size else hidden_states.shape[-2:]
        if tuple(hidden_states.shape[1:]) != (channels, height, width):
            expected = f"(batch, {channels}, {height if size else 'height'}, {width if size else 'width'})"
            raise EdgeDiTError(f"The input has shape {tuple(hidden_states.shape)}; this artefact takes {expected}.")

    def _bucket_edges(self) -> list[float] | None:
        """Borders of the buckets of timesteps with activation scales of their own: a file takes those of its first row
        for all (`None`: no buckets).
        """
        said = self.sessions["denoiser"].metadata
        if "timestep_edges" in said:
            return json.loads(said["timestep_edges"])
        # A file of an older export does not say it; one with a scheme (`.pte`) has dynamic activations.
        older = said.get("precision") == "int8" and not {"activations", "scheme"} & said.keys()
        return [] if older else None

    def _predict(self, inputs: dict[str, torch.Tensor], times: torch.Tensor) -> torch.Tensor:
        """The denoiser's output for rows with these timesteps; rows of several buckets of timesteps go through the file
        bucket by bucket.
        """
        if "timestep" in self.sessions["denoiser"].input_names:  # a split one's, if its scales are by timestep
            inputs = {**inputs, "timestep": times}
        edges = self._bucket_edges()
        if edges is None or bool((times == times[0]).all()):
            return self.run("denoiser", inputs)[0]
        # Without borders: timestep by timestep.
        places = (
            torch.bucketize(times, torch.tensor(edges, dtype=torch.float32), right=True)
            if edges
            else torch.unique(times, return_inverse=True)[1]
        )
        groups = [(places == place).nonzero().flatten() for place in torch.unique(places)]
        if len(groups) == 1:
            return self.run("denoiser", inputs)[0]
        outputs = [
            self.run("denoiser", {name: value[rows.to(value.device)] for name, value in inputs.items()}, pad=True)[0]
            for rows in groups
        ]
        return torch.cat(outputs)[torch.argsort(torch.cat(groups))]

    def _output(
        self, like: torch.Tensor, prediction: torch.Tensor, return_dict: bool
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        sample = prediction.to(like.device, like.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class ExportedEdgeDiT(ExportedTransformer):
    r"""
    An EdgeDiT denoiser in a runtime with the call signature of [`EdgeDiTTransformer2DModel`].

    A split one has [`precompute_modulation`] as the model has, and so a pipeline computes the modulations of a whole
    schedule before it samples.
    """

    @property
    def precompute_modulation(self) -> Callable[..., torch.Tensor]:
        """`(timesteps (T,), class_labels (K,)) → (T, K, 6L + 2, D)`, as
        [`EdgeDiTTransformer2DModel.precompute_modulation`]; of a split denoiser alone.

        Raises:
            AttributeError: the denoiser is not split; pipelines ask whether there is such a method.
        """
        if not self.split:
            raise AttributeError(f"This {type(self).__name__} has no conditioner of its own to compute modulations.")
        return self._precompute_modulation

    def _precompute_modulation(self, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        count = 1 if class_labels is None else len(class_labels)
        labels = None if class_labels is None else class_labels.repeat(len(timesteps))
        table = self._condition(timesteps.repeat_interleave(count), labels)
        return table.view(len(timesteps), count, *table.shape[1:])

    def modulation_steps(self, num_labels: int) -> int:
        """Timesteps whose table of modulations is as large as the weights that make it, at least one."""
        return modulation_steps(self.config, num_labels)

    def _condition(self, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        inputs = {"timestep": timestep.float()}
        return self.run(
            "conditioner", inputs if labels is None else {**inputs, "class_labels": labels.long()}, pad=True
        )[0]

    def _labels(self, class_labels: torch.Tensor | None) -> torch.Tensor | None:
        classes = self.config.num_classes
        if (class_labels is None) != (classes == 0):
            given = "no class_labels were given" if class_labels is None else "class_labels were given"
            raise EdgeDiTError(f"The artefact has num_classes={classes}, but {given}.")
        if class_labels is None:
            return None
        labels = class_labels.to("cpu", torch.int64)
        if not (0 <= int(labels.min()) and int(labels.max()) <= classes):
            raise EdgeDiTError(
                f"class_labels span {int(labels.min())} … {int(labels.max())}; they must be from 0 to {classes}."
            )
        return labels

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        modulation: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Noisy input, of the exported
            size.
            timestep (`torch.Tensor` of shape `(batch,)` or a scalar): Timestep on the scale 0 … 1000.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Classes; `num_classes` means "no class".
            return_dict (`bool`, defaults to `True`): Whether to return a [`Transformer2DModelOutput`].
            modulation (`torch.Tensor` of shape `(batch, 6 * layers + 2, hidden_size)`, *optional*): For a split
            denoiser: a step of the table of
                `precompute_modulation`.

        Returns:
            The prediction, of shape `(batch, out_channels, height, width)`.
        """
        self._check_sample(hidden_states)
        inputs = {"sample": hidden_states}
        times = torch.as_tensor(timestep).to("cpu", torch.float32).expand(len(hidden_states))
        labels = self._labels(class_labels)
        if self.split:
            inputs[MODULATED] = self._condition(times, labels) if modulation is None else modulation
        else:
            inputs |= {"timestep": times} if labels is None else {"timestep": times, "class_labels": labels}
        return self._output(hidden_states, self._predict(inputs, times), return_dict)

    forward = __call__


class ExportedElasticDiT(ExportedTransformer):
    r"""
    An elastic text-to-image denoiser in a runtime with the call signature of [`ElasticDiTTransformer2DModel`]: one
    sub-network, whose name is in the config's `subnet`. `text_tokens` holds the tokens of every text encoder that the
    artefact takes (`None`: any number); shorter texts are padded.

    A split one keeps what its conditioners gave: the modulations of a timestep, and the text of a call.
    """

    PARTS = ("denoiser", "conditioner", "text_conditioner")

    def __init__(self, **config: Any):
        super().__init__(**config)
        self._modulations: dict[float, torch.Tensor] = {}
        self._text: tuple[tuple[Any, ...], dict[str, torch.Tensor]] = ((), {})

    @property
    def active_subnet(self) -> str | None:
        """The exported sub-network (`None`: a stand-alone net)."""
        return self.config.get("subnet")

    def set_active_subnet(self, name: str) -> None:
        """There is but one."""
        self.resolve_subnet(name)

    def resolve_subnet(self, name: str | None = None) -> str | None:
        """The exported sub-network; a ValueError if another one is named."""
        if name not in (None, self.active_subnet):
            raise EdgeDiTError(
                f"The sub-network {name!r} was asked for, but this artefact holds "
                f"{self.active_subnet or 'a stand-alone net'}; export that one."
            )
        return self.active_subnet

    def _texts(
        self, embeds: Sequence[torch.Tensor | None] | None, masks: Sequence[torch.Tensor | None] | None, rows: int
    ) -> dict[str, torch.Tensor]:
        """text_0, mask_0, … of the artefact; an absent encoder is one whose tokens are all masked."""
        dims, lengths = self.config.text_dims, self.config.get("text_tokens") or [None] * len(self.config.text_dims)
        embeds = [None] * len(dims) if embeds is None else list(embeds)
        masks = [None] * len(dims) if masks is None else list(masks)
        if len(embeds) != len(dims) or len(masks) != len(dims):
            raise EdgeDiTError(
                f"{len(embeds)} text embeddings and {len(masks)} masks were given; this net has {len(dims)} text "
                "encoders."
            )
        values: dict[str, torch.Tensor] = {}
        for index, (states, mask, width, length) in enumerate(zip(embeds, masks, dims, lengths)):
            there = 0 if states is None else states.shape[1]
            if states is not None and (states.ndim != 3 or states.shape[0] != rows or states.shape[2] != width):
                raise EdgeDiTError(
                    f"encoder_hidden_states[{index}] has the shape {tuple(states.shape)}; it must be ({rows}, tokens, "
                    f"{width})."
                )
            if length is not None and there > length:
                raise EdgeDiTError(
                    f"encoder_hidden_states[{index}] has {there} tokens, but this artefact was exported for {length}; "
                    "shorten the prompt, or export the pipeline with a larger max_sequence_length."
                )
            tokens = max(1, there) if length is None else length
            text, valid = torch.zeros(rows, tokens, width), torch.zeros(rows, tokens)
            if states is not None:
                text[:, :there] = states.to("cpu", torch.float32)
                valid[:, :there] = 1.0 if mask is None else mask.to("cpu", torch.float32)
            values |= {f"text_{index}": text, f"mask_{index}": valid}
        return values

    def _modulation(self, times: torch.Tensor) -> torch.Tensor:
        """Modulations `(rows, 6L + 2, D)` of timesteps `(rows,)`; each timestep is computed once."""
        unique, place = torch.unique(times, return_inverse=True)
        known = self._modulations  # replaced, never changed: a call in another thread may be reading it
        unknown = [time for time in unique.tolist() if time not in known]
        if unknown:
            if len(known) + len(unknown) > CACHED_MODULATIONS:
                known, unknown = {}, unique.tolist()
            found = self.run("conditioner", {"timestep": torch.tensor(unknown)}, pad=True)[0]
            self._modulations = known = {**known, **dict(zip(unknown, found))}
        return torch.stack([known[time] for time in unique.tolist()])[place]

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: Sequence[torch.Tensor | None] | None = None,
        encoder_attention_mask: Sequence[torch.Tensor | None] | None = None,
        return_dict: bool = True,
        subnet: str | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, H, W)`): Noisy input, of the exported size.
            timestep (`torch.Tensor` of shape `(B,)` or a scalar): Timestep 1000·σ on the scale 0 … 1000.
            encoder_hidden_states, encoder_attention_mask: As for [`ElasticDiTTransformer2DModel`].
            subnet (`str`, *optional*): The exported sub-network, no other.

        Returns:
            The velocity ε − x0, `(B, C, H, W)`.
        """
        self._check_sample(hidden_states)
        self.resolve_subnet(subnet)
        rows = len(hidden_states)
        times = torch.as_tensor(timestep).to("cpu", torch.float32).reshape(-1).expand(rows)
        inputs = {"sample": hidden_states}
        if self.split:
            key = (rows, *(encoder_hidden_states or ()), *(encoder_attention_mask or ()))
            known, text = self._text  # read once: a call in another thread may replace it
            if len(key) != len(known) or any(a is not b for a, b in zip(key[1:], known[1:])) or key[0] != known[0]:
                text = dict(
                    zip(
                        ("text", "text_mask"),
                        self.run("text_conditioner", self._texts(encoder_hidden_states, encoder_attention_mask, rows)),
                    )
                )
                self._text = key, text
            inputs |= {MODULATED: self._modulation(times), **text}
        else:
            inputs |= {"timestep": times, **self._texts(encoder_hidden_states, encoder_attention_mask, rows)}
        return self._output(hidden_states, self._predict(inputs, times), return_dict)

    forward = __call__
