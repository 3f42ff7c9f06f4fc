"""Which samples a step trains on, and loaders of them: functions of (seed, step), whatever the rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import EdgeDiTError

if TYPE_CHECKING:
    from .captions import CaptionedDataset


def stream_generator(seed: int, stream: int) -> np.random.Generator:
    """Counter-based generator of its own for every (seed, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)))


@functools.lru_cache(maxsize=16)  # neighbouring steps share an epoch's permutation, or a few
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation `[num_samples]` int64 of an epoch; read-only, as calls share it."""
    order = stream_generator(seed, epoch).permutation(num_samples)
    order.flags.writeable = False
    return order


def batch_indices(num_samples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Positions of the global batch `step`, `[batch_size]` int64, out of an endless stream of permutations.

    There is one permutation an epoch; a batch may straddle epochs. The result depends on the arguments alone.
    """
    if num_samples < 1 or batch_size < 1 or step < 0:
        raise EdgeDiTError(
            f"num_samples is {num_samples}, batch_size {batch_size}, step {step}; the first two must be at least 1, "
            "step at least 0."
        )
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_samples
    orders = [epoch_order(num_samples, seed, int(epoch)) for epoch in range(epochs[0], epochs[-1] + 1)]
    return np.concatenate([order[positions[epochs == epochs[0] + i] % num_samples] for i, order in enumerate(orders)])


class _Steps(Dataset):
    """Item `step` is one rank's whole batch of that step."""

    def __init__(self, dataset: Dataset, indices_of: Callable[[int], np.ndarray], rows: np.ndarray) -> None:
        self._dataset = dataset
        self._indices_of = indices_of
        self._rows = rows

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return self._dataset.batch(self._indices_of(step)[self._rows])


def step_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    indices_of: Callable[[int], np.ndarray] | None = None,
) -> Iterator[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
    """One rank's part of the batches of steps `start_step` … `total_steps - 1`.

    Args:
        dataset: what `.batch(indices)` is asked of.
        batch_size: global batch, divided evenly between the ranks.
        indices_of: positions of the global batch of a step; default [`batch_indices`].

    Yields:
        (step, rows, batch): rows are this rank's positions in the global batch, `[batch_size / world_size]` int64,
        which is what noise is keyed by; batch as of [`ImageDataset.batch`].
    """
    if batch_size < 1 or batch_size % world_size:
        raise EdgeDiTError(f"batch_size {batch_size} cannot be divided between {world_size} ranks; make it a multiple.")
    share = batch_size // world_size
    rows = np.arange(rank * share, (rank + 1) * share)
    steps = range(start_step, total_steps)
    loader = DataLoader(
        _Steps(dataset, indices_of or functools.partial(batch_indices, len(dataset), batch_size, seed), rows),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        generator=torch.Generator(),  # else the loader draws from, and so moves, the global one
    )
    for step, batch in zip(steps, loader):
        yield step, torch.from_numpy(rows), batch


def bucket_batch(bucket_of: torch.Tensor, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Positions of the global batch `step`, all of one bucket, `[batch_size]` int64; a function of the arguments alone.

    N steps in a row draw every row's bucket once, in random order: buckets come exactly in proportion to their size. A
    bucket's batches are its own endless stream of permutations, as in [`batch_indices`]. With one bucket both are
    the same.
    """
    round_, place = divmod(step, len(bucket_of))
    order = bucket_of.numpy()[epoch_order(len(bucket_of), seed, -1 - round_)]
    bucket = order[place]
    rows = np.flatnonzero(bucket_of.numpy() == bucket)
    before = round_ * len(rows) + int((order[:place] == bucket).sum())
    return rows[batch_indices(len(rows), batch_size, seed, before)]


def caption_loader(
    dataset: CaptionedDataset,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
    """As [`step_loader`]; every global batch comes from one bucket, as [`bucket_batch`] says."""
    indices_of = functools.partial(bucket_batch, dataset.bucket_of, batch_size, seed)
    return step_loader(dataset, batch_size, seed, start_step, total_steps, rank, world_size, num_workers, indices_of)
