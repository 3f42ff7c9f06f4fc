"""MenuSpace: a search space whose choices are a list, each for one to three teacher layers at any offset. No torch.

The paper's space ([`search_space`]) knows four sizes a layer and merges of the pairs (0, 1), (2, 3), …; a menu also
names numbers of heads, several widths and MLP ratios, modulations that are static or of low rank, layers that work on
fewer tokens, and merges of two and three layers wherever they stand.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from .errors import EdgeDiTError
from .genotype import Genotype, LayerSpec, Shape, a_number, a_whole_number
from .records import CHOICES, SPAN
from .schema import shorten
from .search_space import NO_STAGE, SearchSpace, can_merge, layer_cost, teacher_sizes

MENU_KEYS = ("merge", *Shape._fields)


class Choice(NamedTuple):
    """An entry of a menu, as it is for one teacher."""

    merge: int  # teacher layers that it replaces
    shape: Shape
    option: str  # its name, see [`option_name`]


def option_name(shape: Shape, original: Shape) -> str:
    """Name of a shape: what differs from the teacher's, e.g. "attn512-mlp2", "heads8-static", "rank16-tokens2"; or
    "original".
    """
    parts = []
    for prefix, size, its in zip(("attn", "heads", "mlp"), shape, original):
        if size != its:
            parts.append(f"{prefix}{repr(size).removesuffix('.0')}")
    if shape.modulation_rank is not None:
        parts.append(f"rank{shape.modulation_rank}" if shape.modulation_rank else "static")
    if shape.token_merge != 1:
        parts.append(f"tokens{shape.token_merge}")
    return "-".join(parts) or "original"


class MenuSpace(SearchSpace):
    """The legal genotypes of one teacher whose layers are replaced by what a menu lists.

    A code has one integer a teacher layer: the index into [`choices`] of the layer that starts there, and 0 where an
    earlier one reaches over it. Every vector with entries of `allowed` stands for a legal genotype (what is covered is
    skipped); [`codes`] gives each genotype once. The layer that starts at teacher layer 0 is never static, so at least
    one stays conditioned.

    Args:
        num_layers, hidden_size, num_heads, mlp_ratio: the teacher's.
        menu: the choices beside a layer as it is, which is always there: mappings with any of the keys `merge` (1, 2
            or 3 teacher layers that become one), `attention_dim`, `num_heads`, `mlp_ratio`, `modulation_rank` (0:
            static) and `token_merge`; what is left out is the teacher's. At most 16 a number of merged layers.
        allowed: for every teacher layer the indices of the choices that may start there; default all that fit.
    """

    stride = 1

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        menu: Sequence[Mapping[str, Any]] = (),
        allowed: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._set_teacher(num_layers, hidden_size, num_heads, mlp_ratio)
        if not isinstance(menu, Sequence) or isinstance(menu, str) or not menu:
            raise EdgeDiTError(
                f"menu is {shorten(menu)}; list at least one choice in it, or set it to null for the paper's options."
            )
        self.original = Shape(self.hidden_size, self.num_heads, self.mlp_ratio)
        self.choices = (Choice(1, self.original, "original"), *self._choices(menu))
        if len(self.choices) == 1:
            raise EdgeDiTError(
                f"menu is {shorten(list(menu))}, which is the teacher's own layer alone; list a choice beside it, or "
                "set it to null for the paper's options."
            )
        full = [
            [index for index, choice in enumerate(self.choices) if self._fits(choice, at)]
            for at in range(self.num_layers)
        ]
        if allowed is None:
            why = "the layer that starts at teacher layer 0 is never static, so that one stays conditioned"
            allowed = self._all_placed(full, why)
        if len(allowed) != len(full) or any(not set(a) or not set(a) <= set(f) for a, f in zip(allowed, full)):
            raise EdgeDiTError(
                f"allowed must hold {len(full)} non-empty lists of indices of the menu's {len(self.choices)} choices "
                "that fit there; it was made for another menu or teacher."
            )
        self.allowed = tuple(tuple(sorted(set(indices))) for indices in allowed)
        self._index = {(choice.merge, choice.shape): index for index, choice in enumerate(self.choices)}
        self._bits = tuple(
            (place, value)
            for place, default in enumerate(self.original)
            for value in dict.fromkeys(choice.shape[place] for choice in self.choices)
            if value != default
        )
        # Where the cells of the choices that may start at a layer end, in [0, 1]: each is as wide as its share of the
        # genotypes of the layers from there on, so that a uniform point of the cube chooses uniformly.
        self._cells: list[list[float]] = [[]] * self.num_layers
        genotypes = [1] * (self.num_layers + 1)
        for at in reversed(range(self.num_layers)):
            ends = list(accumulate(genotypes[at + self.choices[index].merge] for index in self.allowed[at]))
            genotypes[at], self._cells[at] = ends[-1], [end / ends[-1] for end in ends]
        self._size = genotypes[0]

    def _choices(self, menu: Sequence[Mapping[str, Any]]) -> Iterator[Choice]:
        """The menu's entries, without the teacher's own layer, which need not be listed."""
        known: dict[tuple[int, Shape], int] = {}
        for number, entry in enumerate(menu):
            choice = self._choice(f"menu[{number}]", entry)
            first = known.setdefault((choice.merge, choice.shape), number)
            if first != number:
                raise EdgeDiTError(
                    f"menu[{first}] and menu[{number}] are both {choice.option!r} of {choice.merge} layers; list each "
                    "choice once."
                )
            if (choice.merge, choice.shape) != (1, self.original):
                yield choice
        for merge in range(1, SPAN + 1):
            count = sum(span == merge for span, _ in {*known, (1, self.original)})
            if count > CHOICES:
                raise EdgeDiTError(
                    f"The menu holds {count} choices with merge {merge} (the teacher's own layer included); it may "
                    f"hold {CHOICES}."
                )

    def _choice(self, name: str, entry: Mapping[str, Any]) -> Choice:
        if not isinstance(entry, Mapping) or any(key not in MENU_KEYS for key in entry):
            strange = next((key for key in entry if key not in MENU_KEYS), "") if isinstance(entry, Mapping) else ""
            near = difflib.get_close_matches(str(strange)[:100], MENU_KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"a choice's keys are {', '.join(MENU_KEYS)}."
            raise EdgeDiTError(f"{name} is {shorten(entry)}; {hint}")
        given: dict[str, Any] = {}
        for key, value in entry.items():
            if value is not None:
                try:
                    given[key] = a_number(value) if key == "mlp_ratio" else a_whole_number(value)
                except (TypeError, ValueError, OverflowError):
                    kind = "number" if key == "mlp_ratio" else "whole number"
                    raise EdgeDiTError(
                        f"{name}.{key} is {shorten(value)} ({type(value).__name__}); it must be a {kind} or null."
                    ) from None
        merge = given.pop("merge", 1)
        if merge not in range(1, SPAN + 1) or merge > self.num_layers:
            raise EdgeDiTError(
                f"{name}.merge is {shorten(merge)}; it must be at least 1 and at most {min(SPAN, self.num_layers)} (of "
                f"{self.num_layers} teacher layers)."
            )
        try:
            shape = LayerSpec((0,), **{**self.original._asdict(), **given}).shape
        except EdgeDiTError as error:
            raise EdgeDiTError(f"{name} is {shorten(entry)}: {error}") from None
        for key, largest in (("attention_dim", self.hidden_size), ("mlp_ratio", self.mlp_ratio)):
            if getattr(shape, key) > largest:
                raise EdgeDiTError(f"{name}.{key} is {getattr(shape, key)}, above the teacher's {largest}; lower it.")
        if int(self.hidden_size * shape.mlp_ratio) < 1:
            raise EdgeDiTError(
                f"{name}.mlp_ratio is {shape.mlp_ratio}, which leaves an MLP of hidden_size {self.hidden_size} no "
                f"neuron; it must be at least {1 / self.hidden_size:.3g}."
            )
        if shape.modulation_rank is not None and shape.modulation_rank >= self.hidden_size:
            raise EdgeDiTError(
                f"{name}.modulation_rank is {shape.modulation_rank}; it must be below the hidden_size "
                f"{self.hidden_size}."
            )
        return Choice(merge, shape, option_name(shape, self.original))

    def _all_placed(self, allowed: list[list[int]], why: str) -> list[list[int]]:
        """`allowed`, if every choice may start somewhere."""
        if unplaced := sorted({*range(len(self.choices))}.difference(*allowed)):
            names = ", ".join(f"{self.choices[i].option!r} (merge {self.choices[i].merge})" for i in unplaced)
            raise EdgeDiTError(
                f"Of the menu's choices {names} fit nowhere in this teacher of {self.num_layers} layers: {why}. Leave "
                "them out."
            )
        return allowed

    def _fits(self, choice: Choice, at: int) -> bool:
        return at + choice.merge <= self.num_layers and not (at == 0 and choice.shape.modulation_rank == 0)

    @classmethod
    def for_config(cls, config: Mapping, **sizes: Any) -> MenuSpace:
        """The space of the teacher with this model config and a `menu`; no merge reaches over a place where
        [`can_merge`] forbids it.
        """
        space = cls(*teacher_sizes(config), **sizes)
        grid = config["sample_size"] // config["patch_size"]
        for choice in space.choices:
            if grid % choice.shape.token_merge:
                raise EdgeDiTError(
                    f"The menu's choice {choice.option!r} has token_merge {choice.shape.token_merge}, but the "
                    f"teacher's tokens form a grid of {grid} × {grid}, which it does not divide; leave the choice out."
                )
        if "allowed" in sizes:
            return space
        allowed = [
            [
                index
                for index in indices
                if all(can_merge(config, inner) for inner in range(at, at + space.choices[index].merge - 1))
            ]
            for at, indices in enumerate(space.allowed)
        ]
        why = "no merge may reach over the start or the end of a long skip, or the decoder's start"
        return cls(*teacher_sizes(config), **sizes, allowed=space._all_placed(allowed, why))

    # ---------------------------------------------------------------- shapes

    @property
    def size(self) -> int:
        """Number of legal genotypes."""
        return self._size

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options, "original" first, in the menu's order."""
        return tuple(dict.fromkeys(choice.option for choice in self.choices))

    def option_shape(self, option: str) -> Shape:
        """The shape of an option of this menu."""
        for choice in self.choices:
            if choice.option == option:
                return choice.shape
        raise EdgeDiTError(f"The option is {option!r}; it must be one of {self.options}.")

    def layer(self, source: tuple[int, ...], option: str) -> LayerSpec:
        """The layer that replaces `source` with `option`."""
        layer = super().layer(source, option)
        self._index_of(layer)  # raises when the option is one of other numbers of layers
        return layer

    def option_of(self, layer: LayerSpec) -> str:
        """The option's name of a layer of this space."""
        return self.choices[self._index_of(layer)].option

    def _index_of(self, layer: LayerSpec) -> int:
        if (index := self._index.get((len(layer.source), layer.shape))) is not None:
            return index
        of = "one teacher layer" if len(layer.source) == 1 else f"{len(layer.source)} teacher layers"
        raise EdgeDiTError(
            f"A layer of shape {tuple(layer.shape)} ({', '.join(Shape._fields)}) in the place of {of} is none of the "
            f"menu's {[(choice.merge, choice.option) for choice in self.choices]}: the genotype belongs to another "
            "teacher or another search space."
        )

    def name_of(self, shape: Shape) -> str:
        """What a layer's shape is called."""
        return option_name(shape, self.original)

    def replacements(self) -> list[LayerSpec]:
        """Every layer that a legal genotype may have, the teacher's own included, by first teacher layer."""
        found, reached = [], {0}
        for at in range(self.num_layers):
            if at in reached:
                choices = [self.choices[index] for index in self.allowed[at]]
                found += [LayerSpec(tuple(range(at, at + c.merge)), *c.shape) for c in choices]
                reached.update(at + choice.merge for choice in choices)
        return found

    def proxies(self) -> list[LayerSpec]:
        """Every layer that a proxy bank must hold: the replacements but the teacher's own layers."""
        return [layer for layer in self.replacements() if not self.is_teachers(layer)]

    # ---------------------------------------------------------------- codes

    def code(self, genotype: Genotype) -> tuple[int, ...]:
        """One integer a teacher layer: the choice that starts there, 0 where an earlier one covers it."""
        self._check_teacher(genotype)
        code = [0] * self.num_layers
        for layer in genotype.layers:
            at, index = layer.source[0], self._index_of(layer)
            if index not in self.allowed[at]:
                raise EdgeDiTError(
                    f"The genotype has {self.choices[index].option!r} in the place of the teacher layers "
                    f"{list(layer.source)}; this space allows "
                    f"{[(self.choices[i].merge, self.choices[i].option) for i in self.allowed[at]]} from layer {at} on."
                )
            code[at] = index
        return tuple(code)

    def from_code(self, code: Sequence[int]) -> Genotype:
        """The genotype of a code; entries that an earlier layer covers are skipped."""
        if len(code) != self.num_layers:
            raise EdgeDiTError(f"The code has {len(code)} entries; this space needs {self.num_layers}.")
        layers: list[LayerSpec] = []
        at = 0
        while at < self.num_layers:
            index = int(code[at])
            if index not in self.allowed[at]:
                raise EdgeDiTError(
                    f"Entry {at} of the code is {index}; this space allows {list(self.allowed[at])} there."
                )
            layers += self.layers_at(at, index)
            at += self.choices[index].merge
        return Genotype(tuple(layers), self.hidden_size)

    def layers_at(self, place: int, choice: int) -> list[LayerSpec]:
        """The layer that an entry of a code stands for, where no earlier one covers it."""
        merge, shape, _ = self.choices[choice]
        return [LayerSpec(tuple(range(place, place + merge)), *shape)]

    def codes(self) -> Iterator[tuple[int, ...]]:
        """The code of every legal genotype, in order (mind [`size`])."""
        code = [0] * self.num_layers
        path = [(0, iter(self.allowed[0]))]
        while path:
            at, following = path[-1]
            code[at] = next(following, -1)
            if code[at] < 0:
                code[at] = 0
                path.pop()
                continue
            end = at + self.choices[code[at]].merge
            if end == self.num_layers:
                yield tuple(code)
            else:
                path.append((end, iter(self.allowed[end])))

    def decode(self, x: Sequence[float]) -> Genotype:
        """The genotype whose cell of the cube holds `x` ([0, 1]^L; values outside are clipped)."""
        if len(x) != self.dimension:
            raise EdgeDiTError(f"The point has {len(x)} coordinates; this space has {self.dimension}.")
        code = [0] * self.num_layers
        at = 0
        while at < self.num_layers:
            code[at] = self.allowed[at][bisect_right(self._cells[at][:-1], float(x[at]))]
            at += self.choices[code[at]].merge
        return self.from_code(code)

    def encode(self, genotype: Genotype) -> tuple[float, ...]:
        """The centre of the genotype's cell: `decode(encode(g)) == g`."""
        code = self.code(genotype)
        x = [0.5] * self.num_layers  # a covered coordinate decides nothing
        for layer in genotype.layers:
            at = layer.source[0]
            place, ends = self.allowed[at].index(code[at]), [0.0, *self._cells[at]]
            x[at] = (ends[place] + ends[place + 1]) / 2
        return tuple(x)

    def features(self, genotype: Genotype) -> list[float]:
        """Additive binary description for a surrogate: a genotype that changes one choice stays near its neighbour.

        A teacher layer has one number for every size of the menu that is not the teacher's, each 1 where the layer that
        stands for it has that size, and one that says whether it shares its layer with the next (but the last).
        """
        self.code(genotype)
        row: list[float] = []
        for layer in genotype.layers:
            bits = [float(layer.shape[place] == value) for place, value in self._bits]
            for number in layer.source:
                row += [*bits, float(number != layer.source[-1])]
        return row[:-1]

    def feature_kinds(self) -> list[int]:
        """What kind of change each number of [`features`] says, the same for all layers: 0, 1, …"""
        return [*range(len(self._bits) + 1)] * (self.num_layers - 1) + [*range(len(self._bits))]

    def neighbours(self, genotype: Genotype) -> Iterator[Genotype]:
        """Every legal genotype in which another choice starts at one of the layers. Teacher layers that are no longer
        covered by any become original (or, where that is not allowed, the first choice).
        """
        code = self.code(genotype)
        filled = [index if index in there else there[0] for index, there in zip(code, self.allowed)]
        for layer in genotype.layers:
            at = layer.source[0]
            for index in self.allowed[at]:
                if index != code[at]:
                    yield self.from_code([*filled[:at], index, *filled[at + 1 :]])

    def ends(self) -> tuple[Genotype, Genotype]:
        """The genotypes with the most and with the fewest parameters."""
        weights = [layer_cost(self.hidden_size, choice.shape, tokens=4).weights for choice in self.choices]
        found = []
        for sign in (-1, 1):
            best, code = [0] * (self.num_layers + 1), [0] * self.num_layers
            for at in reversed(range(self.num_layers)):
                best[at], code[at] = min(
                    (sign * weights[index] + best[at + self.choices[index].merge], index) for index in self.allowed[at]
                )
            found.append(self.from_code(code))
        return found[0], found[1]

    # ---------------------------------------------------------------- the paper's two stages

    def stage(self, name: str, genotype: Genotype | None = None) -> MenuSpace:
        """The paper's sequential mode, as [`SearchSpace.stage`]: `"merge"` decides which layers become one, all
        otherwise original; `"options"`, given that stage's genotype, decides the option of each layer.
        """
        if name == "merge":
            kept = [[i for i in there if self.choices[i].option == "original"] for there in self.allowed]
        elif name == "options" and genotype is not None:
            self.code(genotype)
            kept = [list(there) for there in self.allowed]
            for layer in genotype.layers:
                at = layer.source[0]
                kept[at] = [i for i in self.allowed[at] if self.choices[i].merge == len(layer.source)]
        else:
            raise EdgeDiTError(NO_STAGE.format(name))
        return MenuSpace(**{**self.to_dict(), "allowed": kept})

    def to_dict(self) -> dict:
        """Plain values that rebuild the space: `SearchSpace.from_dict(space.to_dict())`."""
        menu = []
        for choice in self.choices[1:]:
            sizes = zip(Shape._fields, choice.shape, self.original)
            entry = {key: value for key, value, its in sizes if value != its}
            menu.append({"merge": choice.merge, **entry} if choice.merge > 1 else entry)
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "menu": menu,
            "allowed": [list(indices) for indices in self.allowed],
        }
