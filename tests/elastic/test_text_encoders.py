"""Losses, masks and the image encoder of the text encoders' training."""

import pytest
import torch

from edgedit_hf.elastic.text_encoders import ImageEncoder, choose_masked, contrastive_loss, masked_loss


def test_contrastive_loss_shares_the_target_of_equal_captions():
    torch.manual_seed(0)
    text, image = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    logits = image @ text.T / 0.5
    plain = contrastive_loss(text, image, torch.eye(4, dtype=torch.bool), 0.5)
    wanted = (
        torch.nn.functional.cross_entropy(logits, torch.arange(4))
        + torch.nn.functional.cross_entropy(logits.T, torch.arange(4))
    ) / 2
    torch.testing.assert_close(plain, wanted)
    # The first two rows have one caption: swapping their images changes nothing.
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    swapped = image[[1, 0, 2, 3]]
    assert contrastive_loss(text[[0, 0, 2, 3]], image, same, 0.5) == pytest.approx(
        float(contrastive_loss(text[[0, 0, 2, 3]], swapped, same, 0.5))
    )


def test_masks_are_a_function_of_seed_step_and_row():
    ids = torch.tensor([[5, 6, 7, 8, 1], [5, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    mask = (ids > 0).long()
    chosen = [choose_masked(ids, mask, 1, 0.5, 3, step, range(3)) for step in range(200)]
    assert torch.equal(choose_masked(ids[1:], mask[1:], 1, 0.5, 3, 9, [1, 2]), chosen[9][1:])
    assert not any((m & ((ids == 1) | (mask == 0))).any() for m in chosen)  # neither the end nor padding
    assert all(m[0].any() and m[1, 0] and not m[2].any() for m in chosen)  # at least one, where there is one
    assert torch.stack(chosen).float().mean(0)[0, :4].mean() == pytest.approx(0.5, abs=0.06)


def test_masked_loss_is_the_mean_of_captions():
    torch.manual_seed(0)
    logits, ids = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    masked = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    per_row = [
        torch.nn.functional.cross_entropy(logits[i][masked[i]], ids[i][masked[i]])
        if masked[i].any()
        else torch.zeros(())
        for i in range(4)
    ]
    torch.testing.assert_close(masked_loss(logits, ids, masked), sum(per_row) / 4)
    halves = [masked_loss(logits[rows], ids[rows], masked[rows]) for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, masked_loss(logits, ids, masked))


@pytest.mark.parametrize(("size", "side"), [((8, 8), 8), ((96, 160), 32), ((20, 20), 16), ((6, 30), 8)])
def test_image_encoder_takes_any_size(size, side):
    encoder = ImageEncoder(3, min(size), 16)
    assert encoder.side == side and encoder(torch.randn(2, 3, *size)).shape == (2, 16)
