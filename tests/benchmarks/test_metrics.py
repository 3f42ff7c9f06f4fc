"""The benchmark of the metrics on a few images, with a small network in the place of MobileNetV2: figures agree."""

import pytest

NETWORK = """
import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten())
        self.head = torch.nn.Linear(108, 5)

    def forward(self, images):
        features = self.body(images)
        return features, (4 * self.head(features)).softmax(1)


def load():
    return Network().eval()
"""


def test_metrics(benchmark, tmp_path, monkeypatch):
    (tmp_path / "mobilenet_features.py").write_text(NETWORK)
    monkeypatch.delitem(__import__("sys").modules, "mobilenet_features", raising=False)
    table, result = benchmark("metrics.py", "--mobilenet", tmp_path, "--count", 60)
    assert result["count"] == 60 and result["features"] == 108 and len(table) == 9
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["Fréchet distance, 58 features"]["torchmetrics"] == pytest.approx(
        rows["Fréchet distance, 58 features"]["ours"], rel=1e-4
    )
    assert all(row["apart"] <= row["limit"] for name, row in rows.items() if not name.startswith("exact"))
    assert 0 < rows["ADM's recall"]["ours"] < 1
