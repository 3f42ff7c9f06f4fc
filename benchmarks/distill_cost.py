"""What one step of the whole proxy bank costs: all 140 proxies of a 28-layer teacher from one forward, against training
them one by one.

    python benchmarks/distill_cost.py [--hidden-size 128] [--batch-size 4] [--repeats 5] [--threads 2] [--json]
    [--check]

Four ways to give every proxy one optimiser step, timed interleaved in one process on the same weights, images and
noise, in fp32:

    shared          what training/distill_proxies.py does: one teacher forward, then every proxy in turn
    (distill.proxy_group.train_step) full forward    one run a proxy, each with a forward of the whole teacher
    prefix only     one run a proxy, each with the teacher layers below its target alone
    lower bound     one teacher forward, and every proxy's forward, backward and update with a plain squared error

Prints seconds and ratios to "shared" (medians over the rounds; within a round all four run next to each other). --check
fails unless shared is at least 5 times cheaper than full forwards, 3 times than prefixes, and at most 1.15 times the
lower bound.
"""

import argparse
import json
import sys

import torch

from edgedit_hf.distill.closed_form import truncated_block
from edgedit_hf.distill.memory_plan import depth_of
from edgedit_hf.distill.proxy_group import Proxy, new_optimizer, teacher_features, train_step
from edgedit_hf.models.transformer_edgedit import EdgeDiTTransformer2DModel
from edgedit_hf.runtimes.timing import environment, measure, paired_ratio
from edgedit_hf.search_space import SearchSpace

LAYERS = 28
REQUIRED_FULL, REQUIRED_PREFIX, ALLOWED_BOUND = 5.0, 3.0, 1.15


def make_proxies(teacher: EdgeDiTTransformer2DModel) -> list[Proxy]:
    """All proxies of the teacher, each with its own optimiser, started as truncated copies: only their cost matters
    here.
    """
    proxies = []
    for layer in SearchSpace.for_config(teacher.config).proxies():
        block = truncated_block(teacher.blocks[layer.source[0]], layer).requires_grad_(True)
        proxies.append(Proxy(layer, block, new_optimizer("adamw", block.parameters(), 1e-4)))
    return proxies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument(
        "--sample-size", type=int, default=16, help="side of the input; patches are 2 × 2, so 16 gives 64 tokens"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless the three ratios are met")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = {"hidden_size": arguments.hidden_size, "num_layers": LAYERS, "num_attention_heads": arguments.heads}
    teacher = (
        EdgeDiTTransformer2DModel(sample_size=arguments.sample_size, num_classes=10, **sizes)
        .eval()
        .requires_grad_(False)
    )
    for linear in (block.modulation for block in teacher.blocks):  # a fresh DiT's layers are the identity
        torch.nn.init.normal_(linear.weight, std=0.05)
    proxies = make_proxies(teacher)
    noisy = torch.randn(arguments.batch_size, teacher.config.in_channels, arguments.sample_size, arguments.sample_size)
    timesteps, labels = torch.rand(arguments.batch_size) * 1000, torch.arange(arguments.batch_size) % 10

    def shared() -> None:
        train_step(proxies, teacher_features(teacher, noisy, timesteps, labels, LAYERS), "normalised")

    def one_by_one(depth: int | None) -> None:
        for proxy in proxies:
            train_step(
                [proxy],
                teacher_features(teacher, noisy, timesteps, labels, depth or depth_of([proxy.layer])),
                "normalised",
            )

    def lower_bound() -> None:
        features = teacher_features(teacher, noisy, timesteps, labels, LAYERS)
        for proxy in proxies:
            x, target = features.of(proxy.layer)
            torch.nn.functional.mse_loss(proxy.block(x, features.conditioning), target).backward()
            proxy.optimizer.step()
            proxy.optimizer.zero_grad()

    ways = {
        "shared": shared,
        "full forward": lambda: one_by_one(LAYERS),
        "prefix only": lambda: one_by_one(None),
        "lower bound": lower_bound,
    }
    timings = measure(ways, warmup=1, repeats=arguments.repeats)
    ratios = {name: paired_ratio(timings[name], timings["shared"]) for name in ways}
    tokens = (arguments.sample_size // 2) ** 2
    print(
        f"One optimiser step of {len(proxies)} proxies of {LAYERS} teacher layers, width {arguments.hidden_size}, "
        f"{tokens} tokens, batch {arguments.batch_size}, fp32, {arguments.threads} threads"
    )
    print(f"{'way':<16}{'seconds':>10}{'ratio to shared':>18}")
    for name, timing in timings.items():
        print(f"{name:<16}{timing.median_ms / 1e3:>10.3f}{ratios[name]:>18.2f}")
    bound = 1 / ratios["lower bound"]
    print(
        f"shared is {ratios['full forward']:.2f}× cheaper than full forwards, {ratios['prefix only']:.2f}× than "
        f"prefixes, {bound:.3f}× the lower bound"
    )
    if arguments.json:
        result = {
            "proxies": len(proxies),
            "seconds": {name: timing.median_ms / 1e3 for name, timing in timings.items()},
            "full_over_shared": ratios["full forward"],
            "prefix_over_shared": ratios["prefix only"],
            "shared_over_bound": bound,
            "environment": environment(arguments.threads),
        }
        print(json.dumps(result))
    if arguments.check and not (
        ratios["full forward"] >= REQUIRED_FULL and ratios["prefix only"] >= REQUIRED_PREFIX and bound <= ALLOWED_BOUND
    ):
        sys.exit(f"required: at least {REQUIRED_FULL}×, at least {REQUIRED_PREFIX}×, at most {ALLOWED_BOUND}×")


if __name__ == "__main__":
    main()
