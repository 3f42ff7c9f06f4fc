"""Genotype: what every layer of a student is, and which teacher layers it replaces. JSON in, JSON out, no torch."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import EdgeDiTError
from .files import parse_json
from .records import LAYERS, WIDTH
from .schema import shorten

RATIO = 1024  # greatest mlp_ratio
LAYER_KEYS = ("source", "attention_dim", "num_heads", "mlp_ratio")
OPTIONAL_KEYS = ("modulation_rank", "token_merge")  # of a layer: in its plain form where they are not the default
TOKEN_MERGES = (1, 2)


class Shape(NamedTuple):
    """What decides a layer's weights and cost; see [`LayerSpec`]."""

    attention_dim: int
    num_heads: int
    mlp_ratio: float
    modulation_rank: int | None = None
    token_merge: int = 1

    @property
    def timed(self) -> Shape:
        """What decides the layer's latency: with precomputed modulation the rank of adaLN costs no time."""
        return self._replace(modulation_rank=None)

    def __str__(self) -> str:
        rank = "" if self.modulation_rank is None else f", modulation_rank {self.modulation_rank}"
        merge = "" if self.token_merge == 1 else f", token_merge {self.token_merge}"
        return f"({self.attention_dim}, {self.num_heads}, {self.mlp_ratio}{rank}{merge})"


def a_whole_number(value: Any) -> int:
    """A whole number that stands for itself; `TypeError` for any other value, `True` too."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is not a whole number")
    return operator.index(value)


def a_number(value: Any) -> float:
    """A number as a float; `TypeError` for any other value, a text and `True` too."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{shorten(value)} is not a number")
    return float(value)


@dataclass(frozen=True)
class LayerSpec:
    """One transformer layer of a student.

    Args:
        source: indices of the consecutive teacher layers that it replaces, e.g. `(4,)` or `(4, 5)`.
        attention_dim: inner width of the attention (qkv: hidden → 3·attention_dim, output: attention_dim → hidden).
        num_heads: attention heads; the head width is `attention_dim / num_heads`.
        mlp_ratio: hidden width of the MLP over the residual width.
        modulation_rank: what stands in the place of adaLN's projection of the conditioning: `None`: the projection
            itself; 0: a learned vector (static); r: such a vector and a remainder of rank r.
        token_merge: the layer works on the means of this many × this many tokens; what it adds goes to each of them.

    Raises:
        EdgeDiTError: a value is out of range or the heads do not divide the attention width.
    """

    source: tuple[int, ...]
    attention_dim: int
    num_heads: int
    mlp_ratio: float
    modulation_rank: int | None = None
    token_merge: int = 1

    def __post_init__(self) -> None:
        first = self.source[0] if self.source else -1
        if first < 0 or self.source != tuple(range(first, first + len(self.source))):
            raise EdgeDiTError(
                f"A layer's source is {list(self.source)}; it must list consecutive teacher layers, e.g. [4] or [4, 5]."
            )
        if self.attention_dim < 1 or self.num_heads < 1 or self.attention_dim % self.num_heads:
            raise EdgeDiTError(
                f"attention_dim {self.attention_dim} is not a positive multiple of num_heads {self.num_heads}; "
                "choose a width that the heads divide."
            )
        if not 0 < self.mlp_ratio < float("inf"):
            raise EdgeDiTError(f"mlp_ratio is {self.mlp_ratio}; it must be a number greater than 0.")
        if self.attention_dim > WIDTH or self.mlp_ratio > RATIO:
            raise EdgeDiTError(
                f"A layer has attention_dim {shorten(self.attention_dim)} and mlp_ratio {self.mlp_ratio}; they must be "
                f"at most {WIDTH} and {RATIO}."
            )
        if self.modulation_rank is not None and not 0 <= self.modulation_rank <= WIDTH:
            raise EdgeDiTError(
                f"modulation_rank is {shorten(self.modulation_rank)}; it must be 0 (static) or more, at most {WIDTH}, "
                "or left out (adaLN's whole projection)."
            )
        if self.token_merge not in TOKEN_MERGES:
            raise EdgeDiTError(f"token_merge is {shorten(self.token_merge)}; it must be one of {TOKEN_MERGES}.")

    @property
    def shape(self) -> Shape:
        """What decides the layer's cost."""
        return Shape(self.attention_dim, self.num_heads, self.mlp_ratio, self.modulation_rank, self.token_merge)

    def to_dict(self) -> dict:
        """The plain form that `config["layers"]` holds."""
        plain = {
            "source": list(self.source),
            "attention_dim": self.attention_dim,
            "num_heads": self.num_heads,
            "mlp_ratio": float(self.mlp_ratio),  # 4 and 4.0 are equal, so they must read the same
        }
        if self.modulation_rank is not None:
            plain["modulation_rank"] = self.modulation_rank
        if self.token_merge != 1:
            plain["token_merge"] = self.token_merge
        return plain

    @classmethod
    def from_dict(cls, layer: Mapping) -> LayerSpec:
        """Read the plain form; unknown or missing keys raise [`EdgeDiTError`]."""
        if not isinstance(layer, Mapping) or set(layer) - set(OPTIONAL_KEYS) != set(LAYER_KEYS):
            got = shorten(sorted(map(str, layer)) if isinstance(layer, Mapping) else layer)
            raise EdgeDiTError(
                f"A layer of a genotype has the keys {got}; it must have exactly {sorted(LAYER_KEYS)}, and may have "
                f"{list(OPTIONAL_KEYS)}."
            )
        try:
            source = tuple(a_whole_number(i) for i in layer["source"])
            attention_dim, num_heads = a_whole_number(layer["attention_dim"]), a_whole_number(layer["num_heads"])
            mlp_ratio = a_number(layer["mlp_ratio"])
            rank, merge = layer.get("modulation_rank"), a_whole_number(layer.get("token_merge", 1))
            rank = None if rank is None else a_whole_number(rank)
        except (TypeError, ValueError, OverflowError) as error:
            raise EdgeDiTError(
                f"A layer of a genotype reads {shorten(dict(layer))}, which is not a layer: {str(error)[:200]}."
            ) from None
        return cls(source, attention_dim, num_heads, mlp_ratio, rank, merge)


@dataclass(frozen=True)
class Genotype:
    """The whole architecture of a student: its layers in order, and the residual width they share with the teacher.

    The sources of the layers, read in order, must be 0, 1, 2, … without gap or repetition: every teacher layer is
    replaced exactly once.
    """

    layers: tuple[LayerSpec, ...]
    hidden_size: int

    def __post_init__(self) -> None:
        sources = [i for layer in self.layers for i in layer.source]
        if not sources or sources != list(range(len(sources))):
            raise EdgeDiTError(
                f"The layers' sources read {shorten(sources)}; a genotype must replace teacher layers 0 … n-1 once "
                "each, in order."
            )
        if not 1 <= self.hidden_size <= WIDTH:
            raise EdgeDiTError(
                f"hidden_size is {shorten(self.hidden_size)}; it must be at least 1 and at most {WIDTH}."
            )
        if len(sources) > LAYERS:
            raise EdgeDiTError(f"The genotype replaces {len(sources)} teacher layers; it may replace at most {LAYERS}.")
        for index, layer in enumerate(self.layers):
            if int(self.hidden_size * layer.mlp_ratio) < 1:
                raise EdgeDiTError(
                    f"Layer {index}: mlp_ratio {layer.mlp_ratio} of hidden_size {self.hidden_size} leaves no neuron; "
                    "take a larger one."
                )
            if layer.modulation_rank is not None and layer.modulation_rank > self.hidden_size:
                raise EdgeDiTError(
                    f"Layer {index}: modulation_rank {layer.modulation_rank} is above the hidden_size "
                    f"{self.hidden_size}, the rank of adaLN's whole projection; take a smaller one, or leave it out."
                )

    @property
    def num_teacher_layers(self) -> int:
        """Number of layers of the teacher that this genotype compresses."""
        return sum(len(layer.source) for layer in self.layers)

    @property
    def merged(self) -> list[tuple[int, ...]]:
        """Teacher layers that share one student layer."""
        return [layer.source for layer in self.layers if len(layer.source) > 1]

    @property
    def compressed(self) -> bool:
        """Whether any layer is smaller than one of DiT's (attention as wide as the net, MLP ratio 4, a modulation of
        full rank, all tokens), or stands for several.
        """
        return any(
            len(layer.source) > 1
            or layer.attention_dim < self.hidden_size
            or layer.mlp_ratio < 4
            or layer.modulation_rank is not None
            or layer.token_merge > 1
            for layer in self.layers
        )

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_layers(self) -> list[dict]:
        """The list of plain dicts that a model's config holds as `layers`."""
        return [layer.to_dict() for layer in self.layers]

    @classmethod
    def from_layers(cls, layers: Sequence[Mapping], hidden_size: int) -> Genotype:
        """Read what a model's config holds as `layers` and `hidden_size`."""
        if not isinstance(layers, Sequence) or isinstance(layers, (str, bytes)):
            raise EdgeDiTError(f"layers is {shorten(layers)}; it must be a list of layer descriptions.")
        if not isinstance(hidden_size, int) or isinstance(hidden_size, bool):
            raise EdgeDiTError(f"hidden_size is {shorten(hidden_size)}; it must be an integer.")
        return cls(tuple(LayerSpec.from_dict(layer) for layer in layers), hidden_size)

    @classmethod
    def of(cls, config: Mapping) -> Genotype:
        """The genotype that a model's config (or a preset's) holds."""
        return cls.from_layers(config["layers"], config["hidden_size"])

    def to_json(self) -> str:
        """Canonical JSON: equal genotypes give equal text."""
        return json.dumps({"hidden_size": self.hidden_size, "layers": self.to_layers()}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Read [`~Genotype.to_json`]'s text."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise EdgeDiTError(
                f"The genotype is not JSON ({error}); expected what Genotype.to_json() writes."
            ) from None
        if not isinstance(data, dict) or set(data) != {"hidden_size", "layers"}:
            keys = shorten(sorted(data)) if isinstance(data, dict) else type(data).__name__
            raise EdgeDiTError(f"The genotype holds {keys}; expected exactly the keys ['hidden_size', 'layers'].")
        return cls.of(data)

    @classmethod
    def original(cls, num_layers: int, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> Genotype:
        """The teacher itself: every layer as it is."""
        return cls(
            tuple(LayerSpec((i,), hidden_size, num_heads, float(mlp_ratio)) for i in range(num_layers)), hidden_size
        )
