"""Our metrics with ADM's evaluator and torchmetrics, on the features that an ImageNet MobileNetV2 gives real images.

    python benchmarks/metrics.py --mobilenet FOLDER [--images FOLDER_OR_ID] [--resolution N] [--count 1300]
    [--threads 2] [--json] [--check]

FOLDER holds `mobilenet_features.py`, whose `load()` gives a module: images in [0, 1] to (features, probabilities). The
first images, with some noise, are scored against as many others. Each figure is computed by this package, by ADM's
arithmetic restated from its formulas (adm_evaluator.py), and by torchmetrics where it has it. Matrix roots need more
images than features, so the Fréchet distance is over as many of the most varying features as there are images for.
--check: figures agree to 1e-4 relative, precision and recall to .005.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import adm_evaluator as adm
import numpy as np
import torch
from diffusers_dit import fail

from edgedit_hf.data.images import load_images
from edgedit_hf.metrics import (
    ModuleExtractor,
    adm_precision_recall,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

RELATIVE, SHARE = 1e-4, 0.005
NOISE = 0.05


class Both(torch.nn.Module):
    """Features and log-probabilities side by side."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features, probabilities = self.network((images / 2 + 0.5).expand(-1, 3, -1, -1))
        return torch.cat([features, probabilities.clamp(min=1e-30).log()], dim=1)


def features_of(folder: Path, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features `[n, D]` and log-probabilities `[n, classes]` of images in [-1, 1]."""
    sys.path.insert(0, str(folder))
    from mobilenet_features import load

    network = load()
    with torch.no_grad():
        widths = [part.shape[1] for part in network(images[:1].expand(-1, 3, -1, -1) / 2 + 0.5)]
    both = ModuleExtractor(Both(network), "mobilenet-v2", sum(widths)).features(images).numpy()
    return both[:, : widths[0]], both[:, widths[0] :]


def compare(samples: np.ndarray, reference: np.ndarray, answers: np.ndarray) -> list[dict]:
    """A row a figure: ours, ADM's and torchmetrics', with our seconds."""
    most = np.argsort(samples.var(0))[-min(samples.shape[1], min(len(samples), len(reference)) - 2) :]
    narrow = samples[:, most], reference[:, most]
    size = min(len(samples), len(reference))
    distance, kernel = adm.of_torchmetrics(*narrow)
    rows = []

    def row(name: str, ours, theirs: float | None, torchmetrics: float | None = None) -> None:
        started = time.perf_counter()
        value = ours()
        seconds = time.perf_counter() - started
        others = {"adm": theirs, "torchmetrics": torchmetrics}
        rows.append({"name": name, "ours": value, **others, "seconds": seconds})

    row(f"Fréchet distance, {len(most)} features", lambda: frechet_distance(*narrow), adm.frechet(*narrow), distance)
    row("kernel distance", lambda: kernel_distance(narrow[0][:size], narrow[1][:size], 1, size)[0], None, kernel)
    row("inception score", lambda: inception_score(answers)[0], adm.inception_score(np.exp(answers.astype(np.float64))))
    theirs = adm.precision_recall(reference, samples)
    for place, name in enumerate(("precision", "recall")):
        row(f"ADM's {name}", lambda p=place: adm_precision_recall(reference, samples)[p], theirs[place])
    for place, name in enumerate(("precision", "recall")):
        row(f"exact {name}", lambda p=place: precision_recall(reference, samples)[p], theirs[place])
    return rows


def apart(row: dict) -> tuple[float, float]:
    """How far a figure is from the others at most, and how far it may be: shares absolute, others relative."""
    others = [value for value in (row["adm"], row["torchmetrics"]) if value is not None]
    if "precision" in row["name"] or "recall" in row["name"]:
        return max(abs(row["ours"] - value) for value in others), SHARE
    return max(abs(row["ours"] / value - 1) for value in others), RELATIVE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mobilenet", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--images", default="digits", help="folder of images or `datasets` id")
    parser.add_argument("--resolution", type=int, help="side that images are brought to")
    parser.add_argument("--count", type=int, default=1300, help="images of each set (at most half of all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = load_images(args.images, label_column="", resolution=args.resolution, validation_fraction=0.0)
    count = min(args.count, len(dataset) // 2)
    order = np.random.default_rng(0).permutation(len(dataset))[: 2 * count]
    images = dataset.batch(order)["images"]
    images[:count] += NOISE * torch.randn(images[:count].shape, generator=torch.Generator().manual_seed(0))
    features, answers = features_of(args.mobilenet, images.clamp(-1, 1))
    rows = compare(features[:count], features[count:], answers[:count])
    print(f"{count} images against {count}, {features.shape[1]} features")
    print(f"{'':34}{'ours':>14}{'ADM':>14}{'torchmetrics':>14}{'apart':>10}{'may':>8}{'seconds':>9}")
    for row in rows:
        row["apart"], row["limit"] = apart(row)
        numbers = "".join(
            f"{'–' if row[k] is None else format(row[k], '.6g'):>14}" for k in ("ours", "adm", "torchmetrics")
        )
        print(f"{row['name']:34}{numbers}{row['apart']:>10.1e}{row['limit']:>8.0e}{row['seconds']:>9.2f}")
    if args.json:
        print(json.dumps({"count": count, "features": features.shape[1], "rows": rows}))
    held = [row for row in rows if not row["name"].startswith("exact")]
    if args.check:
        fail([f"{row['name']}: {row['apart']:.1e} apart" for row in held if row["apart"] > row["limit"]])


if __name__ == "__main__":
    main()
