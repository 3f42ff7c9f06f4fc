"""SearchSpace: which genotypes are legal, the [0, 1]^L codec of the search, and closed-form costs. No torch.

A pair of neighbouring teacher layers is either kept as two layers, each one of four options, or merged into one layer
of four options: 4·4 + 4 = 20 choices a pair, 20^(L/2) genotypes (EdgeDiT, joint space). A last odd layer has the four
options alone. The paper searches in two stages instead (first which pairs to merge, then the option of each remaining
layer): [`SearchSpace.stage`].
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .errors import EdgeDiTError
from .genotype import Genotype, LayerSpec, Shape
from .records import LAYERS, Space
from .schema import check

OPTIONS = ("original", "mlp", "attention", "both")
NO_STAGE = "stage({!r}) is not a stage; use 'merge', or 'options' with the genotype that stage 'merge' chose."
UNMERGED = 16  # codes 0…15 of a pair: 4·(option of the first layer) + (option of the second); 16…19: merged


def default_attention_dim(hidden_size: int, num_heads: int) -> int:
    """The reduced attention width: the multiple of 8·heads nearest to 4/9 of the hidden size (EdgeDiT: 1152 → 512)."""
    unit = 8 * num_heads
    return max(1, round(hidden_size * 4 / 9 / unit)) * unit


class SearchSpace:
    """The legal genotypes of one teacher.

    Args:
        num_layers, hidden_size, num_heads, mlp_ratio: the teacher's.
        reduced_mlp_ratio: MLP ratio of the options "mlp" and "both".
        reduced_attention_dim: attention width of "attention" and "both"; default [`default_attention_dim`].
        allowed: for every pair (and the last odd layer) the codes that may be chosen; default all.
    """

    stride = 2  # teacher layers whose proxies share their features and are made together

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        reduced_mlp_ratio: float = 2.0,
        reduced_attention_dim: int | None = None,
        allowed: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._set_teacher(num_layers, hidden_size, num_heads, mlp_ratio)
        self.reduced_mlp_ratio = float(reduced_mlp_ratio)
        if reduced_attention_dim is None:
            reduced_attention_dim = default_attention_dim(hidden_size, num_heads)
        self.reduced_attention_dim = int(reduced_attention_dim)
        if not self.reduced_mlp_ratio < self.mlp_ratio or not self.reduced_attention_dim < self.hidden_size:
            raise EdgeDiTError(
                f"The reduced sizes (MLP ratio {self.reduced_mlp_ratio}, attention width {self.reduced_attention_dim}) "
                f"must be below the teacher's ({self.mlp_ratio}, {self.hidden_size}); set reduced_mlp_ratio and "
                "reduced_attention_dim."
            )
        neurons = int(self.hidden_size * self.reduced_mlp_ratio) if self.reduced_mlp_ratio > 0 else 0
        if neurons < 1 or self.reduced_attention_dim < 1 or self.reduced_attention_dim % self.num_heads:
            raise EdgeDiTError(
                f"The reduced sizes (MLP ratio {self.reduced_mlp_ratio}, so {neurons} of "
                f"{int(self.hidden_size * self.mlp_ratio)} neurons, attention width {self.reduced_attention_dim}) must "
                f"leave at least one neuron and a width that the {self.num_heads} heads divide; set reduced_mlp_ratio "
                "and reduced_attention_dim (in a recipe, of its section bank)."
            )
        full = [range(UNMERGED + 4)] * (self.num_layers // 2) + [range(4)] * (self.num_layers % 2)
        allowed = full if allowed is None else allowed
        if len(allowed) != len(full) or any(not set(a) or not set(a) <= set(f) for a, f in zip(allowed, full)):
            raise EdgeDiTError(
                f"allowed must hold {len(full)} non-empty lists of codes below 20 (4 for a last odd layer)."
            )
        self.allowed = tuple(tuple(sorted(set(codes))) for codes in allowed)

    def _set_teacher(self, num_layers: int, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        if not 1 <= num_layers <= LAYERS:
            raise EdgeDiTError(f"num_layers is {num_layers}; a search space has at least 1 layer and at most {LAYERS}.")
        self.num_layers = int(num_layers)
        self.hidden_size = int(hidden_size)
        self.num_heads = int(num_heads)
        self.mlp_ratio = float(mlp_ratio)

    @classmethod
    def for_config(cls, config: Mapping, **sizes) -> SearchSpace:
        """The space of the teacher with this model config (`EdgeDiTTransformer2DModel.config`, uncompressed)."""
        teacher = teacher_sizes(config)
        num_layers = teacher[0]
        if "allowed" not in sizes:
            sizes["allowed"] = [
                range(UNMERGED + 4) if can_merge(config, 2 * pair) else range(UNMERGED)
                for pair in range(num_layers // 2)
            ] + [range(4)] * (num_layers % 2)
        return cls(*teacher, **sizes)

    @staticmethod
    def from_dict(values: Mapping) -> SearchSpace:
        """The space of [`~SearchSpace.to_dict`]'s values: the paper's, or a [`~menu_space.MenuSpace`]."""
        check(values, Space, "the search space")
        kind = SearchSpace
        if values.get("menu") is not None:  # a subclass, whose module is built on this one
            kind = importlib.import_module(".menu_space", __package__).MenuSpace
        names = inspect.signature(kind).parameters
        return kind(**{name: values[name] for name in names if name in values})

    # ---------------------------------------------------------------- shapes

    @property
    def num_pairs(self) -> int:
        """Number of pairs of layers (without the last odd layer)."""
        return self.num_layers // 2

    @property
    def size(self) -> int:
        """Number of legal genotypes."""
        size = 1
        for codes in self.allowed:
            size *= len(codes)
        return size

    @property
    def dimension(self) -> int:
        """Dimension L of the codec's cube: one coordinate a teacher layer."""
        return self.num_layers

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options, "original" first."""
        return OPTIONS

    def option_shape(self, option: str) -> Shape:
        """The shape of a layer with one of [`OPTIONS`]."""
        if option not in OPTIONS:
            raise EdgeDiTError(f"The option is {option!r}; it must be one of {OPTIONS}.")
        attention_dim = self.reduced_attention_dim if option in ("attention", "both") else self.hidden_size
        mlp_ratio = self.reduced_mlp_ratio if option in ("mlp", "both") else self.mlp_ratio
        return Shape(attention_dim, self.num_heads, mlp_ratio)

    def layer(self, source: tuple[int, ...], option: str) -> LayerSpec:
        """The layer that replaces `source` with `option`."""
        return LayerSpec(tuple(source), *self.option_shape(option))

    def option_of(self, layer: LayerSpec) -> str:
        """The option's name of a layer of this space."""
        return self.name_of(layer.shape)

    def key(self, layer: LayerSpec) -> str:
        """Address of the layer among a bank's, e.g. `"03/mlp"` or `"04-05/original"`."""
        return "-".join(f"{i:02d}" for i in layer.source) + "/" + self.option_of(layer)

    def name_of(self, shape: Shape) -> str:
        """What a layer's shape is called."""
        for option in OPTIONS:
            if shape == self.option_shape(option):
                return option
        raise EdgeDiTError(
            f"A layer of shape {shape} (attention_dim, num_heads, mlp_ratio) is none of this teacher's options "
            f"{', '.join(str(self.option_shape(o)) for o in OPTIONS)}: the genotype belongs to another teacher or "
            "another search space."
        )

    def is_teachers(self, layer: LayerSpec) -> bool:
        """Whether a layer of this space is one of the teacher's, which no proxy stands for."""
        return len(layer.source) == 1 and self.option_of(layer) == "original"

    def proxies(self) -> list[LayerSpec]:
        """Every layer that a proxy bank must hold: three options a teacher layer, four a pair that may be merged."""
        single = [self.layer((i,), option) for i in range(self.num_layers) for option in OPTIONS[1:]]
        pairs = [p for p in range(self.num_pairs) if self.allowed[p][-1] >= UNMERGED]
        merged = [self.layer((2 * p, 2 * p + 1), option) for p in pairs for option in OPTIONS]
        return single + merged

    def replacements(self) -> list[LayerSpec]:
        """Every layer that a legal genotype may have, the teacher's own included, by first teacher layer."""
        found = {
            layer
            for pair, codes in enumerate(self.allowed)
            for choice in codes
            for layer in self.layers_at(pair, choice)
        }
        return sorted(found, key=lambda layer: (layer.source, OPTIONS.index(self.option_of(layer))))

    # ---------------------------------------------------------------- codes

    def code(self, genotype: Genotype) -> tuple[int, ...]:
        """One integer a pair (0…19), and one (0…3) for a last odd layer."""
        self._check_teacher(genotype)
        at = {layer.source: OPTIONS.index(self.option_of(layer)) for layer in genotype.layers}
        code = []
        for first in range(0, self.num_layers - 1, 2):
            pair = (first, first + 1)
            if pair in at:
                code.append(UNMERGED + at[pair])
            elif (first,) in at and (first + 1,) in at:
                code.append(4 * at[(first,)] + at[(first + 1,)])
            else:
                raise EdgeDiTError(
                    f"The genotype merges {genotype.merged}; only the pairs (0, 1), (2, 3), … may be merged."
                )
        if self.num_layers % 2:
            code.append(at[(self.num_layers - 1,)])
        return self._check(tuple(code))

    def _check_teacher(self, genotype: Genotype) -> None:
        if genotype.num_teacher_layers != self.num_layers or genotype.hidden_size != self.hidden_size:
            raise EdgeDiTError(
                f"The genotype replaces {genotype.num_teacher_layers} layers of width {genotype.hidden_size}, but the "
                f"teacher has {self.num_layers} of width {self.hidden_size}; use the genotype with the teacher it was "
                "made for."
            )

    def from_code(self, code: Sequence[int]) -> Genotype:
        """The genotype of a code."""
        layers: list[LayerSpec] = []
        for pair, choice in enumerate(self._check(tuple(int(c) for c in code))):
            layers += self.layers_at(pair, choice)
        return Genotype(tuple(layers), self.hidden_size)

    def layers_at(self, place: int, choice: int) -> list[LayerSpec]:
        """The layers that an entry of a code stands for: one or two of a pair's."""
        first = 2 * place
        if place == self.num_pairs:
            return [self.layer((first,), OPTIONS[choice])]
        if choice >= UNMERGED:
            return [self.layer((first, first + 1), OPTIONS[choice - UNMERGED])]
        return [self.layer((first,), OPTIONS[choice // 4]), self.layer((first + 1,), OPTIONS[choice % 4])]

    def _check(self, code: tuple[int, ...]) -> tuple[int, ...]:
        if len(code) != len(self.allowed):
            raise EdgeDiTError(f"The code has {len(code)} entries; this space needs {len(self.allowed)}.")
        for pair, (choice, codes) in enumerate(zip(code, self.allowed)):
            if choice not in codes:
                raise EdgeDiTError(f"Entry {pair} of the code is {choice}; this space allows {list(codes)} there.")
        return code

    # A pair's code is a path of two coordinates: the first picks the option of the first layer (or "merged", 4), the
    # second the option of the second layer (or of the merged one). The cells of [0,1]² then are the pair's choices, one
    # to one.
    @staticmethod
    def _path(choice: int) -> tuple[int, int]:
        return (4, choice - UNMERGED) if choice >= UNMERGED else (choice // 4, choice % 4)

    def decode(self, x: Sequence[float]) -> Genotype:
        """The genotype whose cell of the cube holds `x` ([0, 1]^L; values outside are clipped)."""
        if len(x) != self.dimension:
            raise EdgeDiTError(f"The point has {len(x)} coordinates; this space has {self.dimension}.")

        def pick(u: float, among: list[int]) -> int:
            return among[min(len(among) - 1, max(0, int(float(u) * len(among))))]

        code = []
        for pair, codes in enumerate(self.allowed):
            if pair == self.num_pairs:
                code.append(pick(x[2 * pair], list(codes)))
                continue
            paths = [self._path(c) for c in codes]
            first = pick(x[2 * pair], sorted({a for a, _ in paths}))
            second = pick(x[2 * pair + 1], sorted(b for a, b in paths if a == first))
            code.append(UNMERGED + second if first == 4 else 4 * first + second)
        return self.from_code(code)

    def encode(self, genotype: Genotype) -> tuple[float, ...]:
        """The centre of the genotype's cell: `decode(encode(g)) == g`."""
        x: list[float] = []
        for pair, (choice, codes) in enumerate(zip(self.code(genotype), self.allowed)):
            if pair == self.num_pairs:
                x.append((codes.index(choice) + 0.5) / len(codes))
                continue
            paths = [self._path(c) for c in codes]
            first, second = self._path(choice)
            firsts = sorted({a for a, _ in paths})
            seconds = sorted(b for a, b in paths if a == first)
            x += [(firsts.index(first) + 0.5) / len(firsts), (seconds.index(second) + 0.5) / len(seconds)]
        return tuple(x)

    def features(self, genotype: Genotype) -> list[float]:
        """Additive binary description for a surrogate: a genotype that changes one choice stays near its neighbour.

        Five numbers a pair: merged; reduced MLP and reduced attention of the first layer; the same of the second (a
        merged layer counts as both). Two for a last odd layer.
        """
        row: list[float] = []
        for pair, choice in enumerate(self.code(genotype)):
            if pair == self.num_pairs:
                row += [float(choice in (1, 3)), float(choice in (2, 3))]
                continue
            first, second = self._path(choice)
            merged = first == 4
            slots = ((second,) * 2) if merged else (first, second)
            row.append(float(merged))
            for option in slots:
                row += [float(option in (1, 3)), float(option in (2, 3))]
        return row

    def feature_kinds(self) -> list[int]:
        """What kind of change each number of [`~SearchSpace.features`] says, the same for all layers: 0, 1, …"""
        return [0, 1, 2, 1, 2] * self.num_pairs + [1, 2] * (self.num_layers % 2)

    def neighbours(self, genotype: Genotype) -> Iterator[Genotype]:
        """Every legal genotype that differs in one pair."""
        code = self.code(genotype)
        for pair, codes in enumerate(self.allowed):
            for choice in codes:
                if choice != code[pair]:
                    yield self.from_code(code[:pair] + (choice,) + code[pair + 1 :])

    def codes(self) -> Iterator[tuple[int, ...]]:
        """The code of every legal genotype, in order (mind [`~SearchSpace.size`])."""
        return itertools.product(*self.allowed)

    def all(self) -> Iterator[Genotype]:
        """Every legal genotype (mind [`~SearchSpace.size`])."""
        return map(self.from_code, self.codes())

    def ends(self) -> tuple[Genotype, Genotype]:
        """The genotypes with the most and with the fewest parameters: all original, and all merged with "both" (whole
        space).
        """

        def parameters(code: tuple[int, ...]) -> int:
            layers = self.from_code(code).layers
            return sum(layer_cost(self.hidden_size, layer.shape, tokens=1).parameters for layer in layers)

        ends = []
        for pick in (max, min):
            code = tuple(codes[0] for codes in self.allowed)
            for pair, codes in enumerate(self.allowed):  # costs add up, so the pairs can be decided one by one
                code = pick((code[:pair] + (choice,) + code[pair + 1 :] for choice in codes), key=parameters)
            ends.append(self.from_code(code))
        return ends[0], ends[1]

    # ---------------------------------------------------------------- the paper's two stages

    def stage(self, name: str, genotype: Genotype | None = None) -> SearchSpace:
        """The paper's sequential mode: `"merge"` decides which pairs become one layer (2^(L/2) genotypes, all layers
        otherwise original); `"options"`, given that stage's genotype, decides the option of each remaining layer
        (4^n).
        """
        odd = self.num_layers % 2
        allowed: list[Sequence[int]]
        if name == "merge":
            allowed = [*[(0, UNMERGED)] * self.num_pairs, *[(0,)] * odd]
        elif name == "options" and genotype is not None:
            merged = [choice >= UNMERGED for choice in self.code(genotype)[: self.num_pairs]]
            allowed = [range(UNMERGED, UNMERGED + 4) if m else range(UNMERGED) for m in merged]
            allowed += [range(4)] * odd
        else:
            raise EdgeDiTError(NO_STAGE.format(name))
        return SearchSpace(**{**self.to_dict(), "allowed": allowed})

    def to_dict(self) -> dict:
        """Plain values that rebuild the space: `SearchSpace(**space.to_dict())`."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "reduced_mlp_ratio": self.reduced_mlp_ratio,
            "reduced_attention_dim": self.reduced_attention_dim,
            "allowed": [list(codes) for codes in self.allowed],
        }


def teacher_sizes(config: Mapping) -> tuple[int, int, int, float]:
    """(num_layers, hidden_size, num_heads, mlp_ratio) of the teacher with this model config.

    Raises:
        EdgeDiTError: its layers are not all whole and equal.
    """
    teacher = Genotype.of(config)
    shapes = {layer.shape for layer in teacher.layers}
    if len(shapes) != 1 or teacher.merged:
        raise EdgeDiTError(
            f"The teacher has {len(shapes)} different layer shapes and {len(teacher.merged)} merged layers; "
            "only an uncompressed teacher (equal layers) can be compressed."
        )
    shape = shapes.pop()
    attention_dim, num_heads, mlp_ratio = shape[:3]
    if shape != Shape(attention_dim, num_heads, mlp_ratio):
        raise EdgeDiTError(
            f"The teacher's layers have modulation_rank {shape.modulation_rank} and token_merge "
            f"{shape.token_merge}; only an uncompressed teacher can be compressed."
        )
    if attention_dim != teacher.hidden_size:
        raise EdgeDiTError(
            f"The teacher's attention width {attention_dim} is not its hidden size {teacher.hidden_size}."
        )
    return len(teacher.layers), teacher.hidden_size, num_heads, mlp_ratio


def can_merge(config: Mapping, first: int) -> bool:
    """Whether teacher layers `first` and `first + 1` may become one: no long skip starts or ends, and no decoder
    begins, between them.
    """
    skips = config.get("long_skips") or []
    return all(start != first and end != first + 1 for start, end in skips) and config.get("decoder_start") != first + 1


# -------------------------------------------------------------------- closed-form costs

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 4, "int4": 4}  # of what layers hand on, by weights' precision


@dataclass(frozen=True)
class Cost:
    """Cost of one forward of one image.

    `parameters` includes the fixed position embedding, as published counts do; `weights` does not. FLOPs are 2 a
    multiply-accumulate plus 4 an element of every LayerNorm and 1 an element of GELU and SiLU (the counter whose total
    for DiT-XL/2 is the published 237.34 G).
    """

    parameters: int
    weights: int
    macs: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.weights + other.weights,
            self.macs + other.macs,
            self.flops + other.flops,
        )

    def bytes(self, precision: str) -> int:
        """Bytes of the learned weights at fp32, bf16, fp16, int8 or int4 (scales not counted)."""
        return int(self.weights * BYTES[precision])


def layer_cost(hidden_size: int, shape: Shape, tokens: int, head_weights: int = 0) -> Cost:
    """Cost of one layer of this shape on `tokens` tokens; `head_weights`: of a head, see [`position_weights`]."""
    attention_dim, num_heads, mlp_ratio, rank, merge = shape
    mlp_dim = int(hidden_size * mlp_ratio)
    tokens //= merge * merge
    # adaLN: the whole projection, or one of rank r (0: none); both have a bias
    projection = 6 * hidden_size * hidden_size if rank is None else 7 * hidden_size * rank
    weights = (
        hidden_size * 3 * attention_dim + 3 * attention_dim  # qkv
        + attention_dim * hidden_size + hidden_size  # output projection
        + 2 * hidden_size * mlp_dim + mlp_dim + hidden_size  # MLP
        + projection + 6 * hidden_size  # adaLN
        + num_heads * head_weights
    )  # fmt: skip
    macs = tokens * (4 * hidden_size * attention_dim + 2 * hidden_size * mlp_dim) + 2 * tokens * tokens * attention_dim
    macs += projection
    extras = 2 * 4 * tokens * hidden_size + tokens * mlp_dim
    return Cost(weights, weights, macs, 2 * macs + extras)


def position_weights(config: Mapping) -> int:
    """Learned weights that a head has for relative positions (MDT); 0 where it has none."""
    return (2 * (config["sample_size"] // config["patch_size"]) - 1) ** 2 if config.get("position_bias") else 0


def trunk_cost(config: Mapping, tokens: int) -> Cost:
    """Cost of everything outside the layers: embedders, final layer, and what MDT adds (long skips, side blocks; the
    latter are weights that sampling does not run)."""
    d, patch, channels = config["hidden_size"], config["patch_size"], config["in_channels"]
    out = channels * (2 if config["learn_sigma"] else 1) * patch * patch
    frequencies = 256
    labels = (config["num_classes"] + 1) * d if config["num_classes"] else 0
    weights = channels * patch * patch * d + d + frequencies * d + d + d * d + d + labels
    weights += d * 2 * d + 2 * d + d * out + out
    macs = tokens * channels * patch * patch * d + frequencies * d + d * d + 2 * d * d + tokens * d * out
    extras = d + d + 4 * tokens * d
    skips = len(config.get("long_skips") or [])
    weights += skips * (2 * d * d + d)
    macs += skips * tokens * 2 * d * d
    fixed_positions = tokens * d
    if config.get("learned_position"):
        weights, fixed_positions = weights + tokens * d, 0
    if config.get("decoder_start") is not None:
        weights += tokens * d
    if side := config.get("side_layers", 0):
        shape = Shape(d, config["num_attention_heads"], config["mlp_ratio"])
        weights += d + side * layer_cost(d, shape, tokens, position_weights(config)).weights
    return Cost(weights + fixed_positions, weights, macs, 2 * macs + extras)


def model_cost(config: Mapping, height: int | None = None, width: int | None = None) -> Cost:
    """Cost of a whole model from its config, for an input of `height` × `width` (default the config's
    `sample_size`).
    """
    height, width = height or config["sample_size"], width or config["sample_size"]
    tokens = (height // config["patch_size"]) * (width // config["patch_size"])
    total = trunk_cost(config, tokens)
    for layer in Genotype.of(config).layers:
        total += layer_cost(config["hidden_size"], layer.shape, tokens, position_weights(config))
    return total


def activation_bytes(values: float, batch: int, precision: str) -> float:
    """Bytes of so many values of every image of a batch, where the weights have a precision of [`BYTES`]."""
    return float(values * batch * VALUE_BYTES[precision])


def grid_tokens(config: Mapping) -> int:
    """Tokens of an input of the config's `sample_size`."""
    return (config["sample_size"] // config["patch_size"]) ** 2


def live_values(config: Mapping, layer: LayerSpec) -> int:
    """Values of one image that are alive at once somewhere in a layer, at least: its input, beside it the operands and
    the result of the largest step (attention with all its scores, as exported graphs hold them), and what long skips
    keep over it. Position biases are left out.
    """
    attention_dim, num_heads, mlp_ratio, _, merge = layer.shape
    tokens, hidden_size = grid_tokens(config), config["hidden_size"]
    inside, mlp_dim = tokens // (merge * merge), int(hidden_size * mlp_ratio)
    steps = (
        inside * (hidden_size + 3 * attention_dim),  # the norm's result, and query, key and value
        inside * (3 * attention_dim + num_heads * inside),  # these, and the scores
        inside * (hidden_size + mlp_dim),  # the MLP's input or output, and its neurons
    )
    first, last = layer.source[0], layer.source[-1]
    kept = sum(start < first - 1 and end > last for start, end in config.get("long_skips") or [])
    return tokens * hidden_size * (1 + kept) + max(steps)


def trunk_live_values(config: Mapping) -> int:
    """As [`live_values`], outside the layers: the last norm's operand and result, or two inputs of a long skip, side by
    side, and a copy of both in one.
    """
    return grid_tokens(config) * config["hidden_size"] * (4 if config.get("long_skips") else 2)


def peak_live_values(config: Mapping, genotype: Genotype) -> int:
    """Values of one image that a student holds at once, at least: those of its layer that holds the most."""
    return max(trunk_live_values(config), *(live_values(config, layer) for layer in genotype.layers))


# -------------------------------------------------------------------- elastic text-to-image nets

TEXT_TOKENS = 128  # tokens of every text encoder that costs are stated for


def _elastic_parts(config: Mapping, subnet: str | None, height: int, width: int, text_tokens: int) -> tuple[Cost, int]:
    """Cost of a sub-network as a stand-alone net, and how many of its weights a supernet holds once a width
    (modulation, norms of heads).
    """
    share = 1.0 if subnet is None else config["subnets"][subnet]
    heads, kv_heads, channels = (
        round(config["num_attention_heads"] * share),
        round(config["num_key_value_heads"] * share),
        config["attention_head_dim"],
    )
    d, kv, text_kv = heads * channels, kv_heads * channels, config["num_text_key_value_heads"] * channels
    patch, e, frequencies = config["patch_size"], config["text_width"], 256
    pixels = patch * patch * config["in_channels"]
    fine = (height // patch) * (width // patch)
    depth, encoders = sum(config["num_layers"]), len(config["text_dims"])
    text = encoders * (text_tokens + 1)  # each encoder has a learned token of its own
    strip = -(-fine // config["attention_blocks"])
    reach = config["attention_radius"] * strip

    modulation = frequencies * d + d + d * d + d + 6 * d * d + 6 * d + (6 * depth + 2) * d
    head_norms = 8 * channels
    weights = pixels * d + d + sum(dim * e + e + 2 * e for dim in config["text_dims"]) + encoders * e + modulation
    weights += 4 * d * d + d + d * d + d + d * pixels + pixels  # down- and up-sample, output
    macs = (
        2 * fine * pixels * d
        + text_tokens * e * sum(config["text_dims"])
        + frequencies * d
        + 7 * d * d
        + fine // 4 * 5 * d * d
    )
    extras = 4 * encoders * text_tokens * e + 2 * d + 4 * fine * d
    for stage, (layers, ratio) in enumerate(zip(config["num_layers"], config["mlp_ratios"])):
        n, mlp = (fine // 4 if stage == 1 else fine), round(d * ratio)
        layer = 4 * (d * d + d) + 2 * (d * kv + kv) + 2 * (e * text_kv + text_kv) + head_norms + 2 * d * mlp + mlp + d
        products = n * (4 * d * d + 2 * d * kv + 2 * d * mlp) + 2 * text * e * text_kv + 2 * n * text * d
        others = 4 * (4 * n * d + n * kv + text * text_kv) + n * mlp
        if stage == 1:
            products += 2 * n * n * d
            skips = (layers - 1) // 2 if layers else 0
            weights += skips * (2 * d * d + d)
            macs += skips * n * 2 * d * d
        else:  # two branches, each over part of the keys, and the gate between them
            layer += 2 * (4 * kv + kv) + d * heads + heads
            seen = sum(
                (min(n, s + strip) - s) * (min(n, s + strip + reach) - max(0, s - reach)) for s in range(0, n, strip)
            )
            products += 2 * d * (n * (n // 4) + seen) + n * d * heads
            others += 4 * n * kv + 4 * (n // 4) * kv + n * heads  # compression, norm of the compressed keys, gate
        weights, macs, extras = weights + layers * layer, macs + layers * products, extras + layers * others
    return Cost(weights, weights, macs, 2 * macs + extras), modulation + depth * head_norms


def elastic_cost(
    config: Mapping,
    subnet: str | None = None,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int = TEXT_TOKENS,
) -> Cost:
    """Cost of one forward of an elastic net's sub-network (default: the full net) on one image, as the stand-alone net
    that it is when extracted; `text_tokens` of every text encoder, and `height` × `width` latents (default the config's
    `sample_size`).
    """
    return _elastic_parts(config, subnet, height or config["sample_size"], width or config["sample_size"], text_tokens)[
        0
    ]


def elastic_weights(config: Mapping) -> int:
    """Learned weights of a whole elastic net: those of the full net, and what each other sub-network has of its own."""
    size, subnets = config["sample_size"], config.get("subnets") or {}
    own = sum(_elastic_parts(config, name, size, size, 0)[1] for name, share in subnets.items() if share != 1)
    return elastic_cost(config).weights + own
