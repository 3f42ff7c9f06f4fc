"""Batches as a function of seed and step: every image once an epoch, the same on any ranks, one bucket a batch."""

import time
from collections import Counter

import numpy as np
import pytest
import torch

from edgedit_hf.data.batches import batch_indices, bucket_batch, caption_loader, step_loader
from edgedit_hf.data.images import load_images
from edgedit_hf.errors import EdgeDiTError


def test_batches_run_through_every_epoch_once():
    stream = np.concatenate([batch_indices(10, 4, seed=3, step=step) for step in range(10)])
    epochs = stream.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    wide = batch_indices(10, 40, seed=3, step=0)  # one batch over four epochs
    assert np.array_equal(wide, stream) and wide.dtype == np.int64


def test_a_batch_depends_on_its_arguments_alone():
    first = batch_indices(1000, 64, seed=0, step=50)
    for step in (3, 77, 500):
        batch_indices(1000, 64, seed=0, step=step)
    assert np.array_equal(first, batch_indices(1000, 64, seed=0, step=50))
    assert not np.array_equal(first, batch_indices(1000, 64, seed=1, step=50))
    with pytest.raises(EdgeDiTError, match="step -1"):
        batch_indices(10, 4, 0, -1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_and_restarts_see_the_same_stream(num_workers):
    dataset = load_images()
    before = torch.get_rng_state()
    whole = list(step_loader(dataset, 8, seed=1, start_step=0, total_steps=5))
    assert [step for step, _, _ in whole] == [0, 1, 2, 3, 4]
    parts = [
        list(step_loader(dataset, 8, 1, 3, 5, rank=rank, world_size=2, num_workers=num_workers)) for rank in range(2)
    ]
    for (step, rows, batch), *ranks in zip(whole[3:], *parts):
        assert [r[0] for r in ranks] == [step, step] and rows.tolist() == list(range(8))
        assert torch.equal(torch.cat([r[1] for r in ranks]), rows)
        for key in ("images", "labels"):
            assert torch.equal(torch.cat([r[2][key] for r in ranks]), batch[key])
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(EdgeDiTError, match="batch_size 8 cannot be divided between 3 ranks"):
        next(step_loader(dataset, 8, 0, 0, 1, world_size=3))


def test_a_batch_of_digits_costs_less_than_a_millisecond():
    loader = step_loader(load_images(), 128, seed=0, start_step=0, total_steps=200)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3


def test_one_bucket_a_batch_in_exact_proportion_and_every_image_once_an_epoch():
    bucket_of = torch.tensor([0] * 12 + [1] * 6 + [2] * 3)[
        torch.randperm(21, generator=torch.Generator().manual_seed(0))
    ]
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    order = []
    for step in range(42):
        rows = bucket_batch(bucket_of, 3, 7, step)
        (bucket,) = bucket_of[rows].unique().tolist()
        seen[bucket] += rows.tolist()
        order.append(bucket)
    assert Counter(order) == {0: 24, 1: 12, 2: 6} and Counter(order[:21]) == {0: 12, 1: 6, 2: 3}
    assert order[:21] != order[21:] and order[:21] != sorted(order[:21])
    for bucket, rows in seen.items():
        members = torch.nonzero(bucket_of == bucket).flatten().tolist()
        for start in range(0, len(rows), len(members)):
            assert sorted(rows[start : start + len(members)]) == members


def test_the_stream_is_a_function_of_seed_and_step(bucketed):
    whole = {step: batch for step, _, batch in caption_loader(bucketed, 4, 3, 0, 12)}
    for step, rows, batch in caption_loader(bucketed, 4, 3, 5, 12, rank=1, world_size=2, num_workers=1):
        assert rows.tolist() == [2, 3]
        assert torch.equal(batch["images"], whole[step]["images"][2:]) and torch.equal(
            batch["rows"], whole[step]["rows"][2:]
        )
    assert len({batch["images"].shape for batch in whole.values()}) == 3
    with pytest.raises(EdgeDiTError, match="cannot be divided between 3 ranks"):
        next(caption_loader(bucketed, 4, 3, 0, 1, world_size=3))


def test_one_bucket_streams_as_uncaptioned_images_do(digits):
    from edgedit_hf.data.batches import batch_indices

    train = digits["train"]
    for step in (0, 11, 400):
        assert bucket_batch(train.bucket_of, 128, 5, step).tolist() == batch_indices(len(train), 128, 5, step).tolist()
