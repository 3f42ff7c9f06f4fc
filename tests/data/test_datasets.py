"""Image datasets in memory: subsets, data loaders, labels that must fit."""

import numpy as np
import pytest
import torch

from edgedit_hf.data.datasets import ImageDataset
from edgedit_hf.data.images import load_images
from edgedit_hf.errors import EdgeDiTError


def test_subset():
    dataset = ImageDataset(np.arange(5 * 4, dtype=np.uint8).reshape(5, 1, 2, 2), [0, 1, 0, 1, 1], ["a", "b"])
    part = dataset.subset([4, 1])
    assert part.labels.tolist() == [1, 1] and torch.equal(part.batch([0])["images"], dataset.batch([4])["images"])
    dataset.batch([0])
    assert dataset.subset([4, 1]).fingerprint == part.fingerprint != dataset.fingerprint
    assert torch.equal(dataset.subset([4, 1]).batch([1])["images"], part.batch([1])["images"])


def test_works_in_a_torch_data_loader():
    dataset = load_images()
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert torch.equal(batch["images"], dataset.batch(range(4))["images"])
    assert torch.equal(batch["labels"], dataset.labels[:4])
    assert torch.equal(dataset[-1]["images"], dataset.batch([len(dataset) - 1])["images"][0])
    assert sum(1 for _ in dataset) == len(dataset)


def test_labels_must_fit_the_images():
    images = np.zeros((3, 1, 8, 8), dtype=np.uint8)
    with pytest.raises(EdgeDiTError, match="3 images but 2 labels"):
        ImageDataset(images, [0, 1], ["a", "b"])
    with pytest.raises(EdgeDiTError, match="label 2 of image 1 is out of range"):
        ImageDataset(images, [0, 2, 1], ["a", "b"])
    with pytest.raises(EdgeDiTError, match="expected uint8"):
        ImageDataset(images.astype(np.float32))
