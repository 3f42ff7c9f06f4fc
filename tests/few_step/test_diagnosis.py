"""The figures that say whether distillation works, and the two rules that turn them into words."""

import pytest
import torch

from edgedit_hf.few_step.diagnosis import (
    CRITIC_LAGS,
    GUIDANCE_TOO_STRONG,
    Diagnosis,
    Moments,
    agreement_of_scores,
    drift_message,
)


def test_gap_and_cosine():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(3, 1, 4, 4, generator=generator)
    same = agreement_of_scores(real, real)
    assert float(same["gap"]) == 0 and float(same["cosine"]) == pytest.approx(1)
    longer = agreement_of_scores(real, 1.5 * real)
    assert float(longer["gap"]) == pytest.approx(0.5) and float(longer["cosine"]) == pytest.approx(1)
    opposite = agreement_of_scores(real, -real)
    assert float(opposite["gap"]) == pytest.approx(2) and float(opposite["cosine"]) == pytest.approx(-1)


def update(diagnosis: Diagnosis, gap: float, cosine: float, std: float) -> str:
    diagnosis.see(gap=torch.tensor(gap), cosine=torch.tensor(cosine))
    return diagnosis.update(std)


@pytest.mark.parametrize(
    ("gap", "cosine", "std", "said"),
    [
        (0.066, 0.95, 0.75, ""),
        (0.104, 0.95, 0.75, ""),  # the gap alone says nothing
        (0.104, 0.80, 0.75, CRITIC_LAGS),
        (0.104, 0.80, 0.90, CRITIC_LAGS),
        (0.104, 0.95, 0.90, GUIDANCE_TOO_STRONG),
        (0.066, 0.80, 0.90, ""),
        (0.030, 0.99, 0.90, ""),
    ],
)
def test_the_two_rules(gap, cosine, std, said):
    diagnosis = Diagnosis()
    assert update(diagnosis, gap=0.066, cosine=0.95, std=0.75) == ""
    for _ in range(30):
        now = update(diagnosis, gap=gap, cosine=cosine, std=std)
    assert now == said


def test_one_odd_measurement_says_nothing_and_a_checkpoint_remembers():
    diagnosis = Diagnosis()
    for _ in range(3):
        update(diagnosis, gap=0.1, cosine=0.95, std=0.75)
    assert update(diagnosis, gap=0.15, cosine=0.85, std=0.75) == ""
    other = Diagnosis()
    other.load_state_dict(diagnosis.state_dict())
    for _ in range(20):
        said = [update(one, gap=0.15, cosine=0.85, std=0.75) for one in (diagnosis, other)]
        assert said[0] == said[1]
    assert said[0] == CRITIC_LAGS and diagnosis.state_dict() == other.state_dict()


def test_measurements_are_means_of_what_was_seen_and_are_not_lost_between():
    whole, stopped = Diagnosis(), Diagnosis()
    for one in (whole, stopped):
        assert one.update(0.75) == "" and one.first == {}  # nothing was seen
        one.see(gap=torch.tensor(0.1), cosine=torch.tensor(0.9))
    continued = Diagnosis()
    continued.load_state_dict(stopped.state_dict())
    for one in (whole, continued):
        one.see(gap=torch.tensor(0.3), cosine=torch.tensor(0.8))
        one.update(0.75)
    assert whole.state_dict() == continued.state_dict()
    assert whole.first == pytest.approx({"gap": 0.2, "cosine": 0.85, "std": 0.75})


def test_moments_and_drift():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(50, 2, 8, 8, generator=generator) * torch.tensor([0.5, 1.0]).view(1, 2, 1, 1) - 0.4
    real = Moments.of(data)
    assert real.mean == pytest.approx(float(data.mean()), abs=1e-5)
    assert real.std == pytest.approx(float(data.std()), abs=1e-5)
    torch.testing.assert_close(real.channel_mean, data.mean((0, 2, 3)))
    torch.testing.assert_close(real.channel_std, torch.stack([data[:, c].std() for c in range(2)]))
    assert drift_message(real, real, 0.15, 0.15) is None
    moved = Moments.of(data + 0.2 * real.std)
    assert real.drift_to(moved) == pytest.approx((0.2, 0.0), abs=1e-4)
    said = drift_message(real, moved, 0.15, 0.15)
    assert (
        "mean has drifted" in said and "0.20 of their standard deviation, 0.15 is allowed (few_step.mean_drift)" in said
    )
    assert drift_message(real, moved, 0.25, 0.15) is None
    for factor in (1.2, 0.8):
        flat = Moments.of(real.mean + factor * (data - real.mean))
        said = drift_message(real, flat, 0.15, 0.15)
        assert "standard deviation has drifted" in said and "20 % off, 15 % is allowed (few_step.std_drift)" in said
        assert drift_message(real, flat, 0.15, 0.25) is None
