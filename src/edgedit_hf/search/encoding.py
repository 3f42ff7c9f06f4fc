"""Codes as rows of numbers: what a surrogate of the search is fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..genotype import Genotype, LayerSpec
from ..search_space import SearchSpace
from .programme import Programme
from .programme_search import swap


class Encoding:
    """Codes as rows of numbers: the space's features, then, where there is a programme, its score and its costs.

    All of that adds up over a code's entries, or is the greatest of them (`Programme.largest`; `worst` and `peaks` are
    found at the end), so a batch of codes is looked up in a table, without a genotype each.

    Args:
        space: whose codes.
        programme: of the space's replacements.
    """

    def __init__(self, space: SearchSpace, programme: Programme | None = None) -> None:
        added = ("score", *programme.cost_names) if programme else ()
        self._worst = programme.worst if programme else {}
        self._peaks = programme.peaks if programme else {}
        names = (*added, *self._worst, *self._peaks)
        whole = SearchSpace.from_dict({**space.to_dict(), "allowed": None})
        teacher = Genotype.original(space.num_layers, space.hidden_size, space.num_heads, space.mlp_ratio)
        blocks = {block.layer: block for block in programme.blocks} if programme else {}

        def row(layer: LayerSpec) -> list[float]:
            values = whole.features(swap(teacher, layer))  # those of layers as they are: all 0
            if programme:
                values += [blocks[layer].score, *(blocks[layer].costs[name] for name in programme.cost_names)]
                values += [0.0] * (len(self._worst) + len(self._peaks))
            return values

        known = [layer for layer in space.replacements() if not programme or layer in blocks]
        rows = {layer: torch.tensor(row(layer), dtype=torch.float64) for layer in known}
        self.width = len(next(iter(rows.values())))
        self.num_features = self.width - len(names)
        self.kinds = whole.feature_kinds()  # of every feature
        self.columns = {name: self.num_features + place for place, name in enumerate(names)}
        self._largest = [self.columns[name] for name in sorted(programme.largest)] if programme else []
        choices = 1 + max(max(codes) for codes in space.allowed)
        self._rows = torch.zeros(len(space.allowed), choices, self.width, dtype=torch.float64)
        self._reach = torch.zeros(len(space.allowed), choices, dtype=torch.long)  # 0: is not allowed there
        for place, codes in enumerate(space.allowed):
            for choice in codes:
                layers = space.layers_at(place, choice)
                if all(layer in rows for layer in layers):  # else it is always covered, or the bank lacks it
                    each = torch.stack([rows[layer] for layer in layers])
                    self._rows[place, choice] = each.sum(dim=0)
                    self._rows[place, choice, self._largest] = each[:, self._largest].amax(dim=0)
                    self._reach[place, choice] = -(-sum(len(layer.source) for layer in layers) // space.stride)
        self._fixed = torch.zeros(self.width, dtype=torch.float64)
        if programme:
            for name, value in programme.fixed.items():
                self._fixed[self.columns[name]] = value

    def canonical(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[n, places]` with 0 where an earlier entry covers one, and which of them are legal `[n]`."""
        codes = codes.long().clone()
        reached = torch.zeros(len(codes), dtype=torch.long)
        legal = torch.ones(len(codes), dtype=torch.bool)
        for place in range(codes.shape[1]):
            starts = reached <= place
            codes[:, place] = torch.where(starts, codes[:, place], 0)
            reach = self._reach[place, codes[:, place]]
            legal &= ~starts | (reach > 0)
            reached = torch.where(starts, place + reach, reached)
        return codes, legal

    def rows(self, codes: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """The rows `[n, width]` of canonical codes `[n, places]`."""
        codes = torch.as_tensor(codes, dtype=torch.long)
        found = self._fixed.repeat(len(codes), 1)
        reached = torch.zeros(len(codes), dtype=torch.long)
        for place in range(codes.shape[1]):
            starts = reached <= place
            choice = codes[:, place]
            row = self._rows[place, choice] * starts[:, None]
            largest = torch.maximum(found[:, self._largest], row[:, self._largest])
            found += row
            found[:, self._largest] = largest
            reached = torch.where(starts, place + self._reach[place, choice], reached)
        for name, parts in self._worst.items():
            each = [factor * found[:, self.columns[part]] for part, factor in parts.items()]
            found[:, self.columns[name]] = torch.stack(each).amax(dim=0)
        for name, peak in self._peaks.items():
            found[:, self.columns[name]] = found[:, self.columns[peak.added]] + found[:, self.columns[peak.largest]]
        return found
