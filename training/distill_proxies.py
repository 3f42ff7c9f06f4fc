"""Stage 2: the proxy bank. Every smaller stand-in of every teacher layer is distilled on its own from the teacher's features.

    accelerate launch training/distill_proxies.py --config training/recipes/digits.yaml

One teacher forward a step yields input and output of all layers and so feeds all proxies. Ranks own disjoint pairs of layers and run
only the teacher prefix that these need. Single reductions are trained first; "both" starts from the attention of one and the MLP of
another and is then trained like the rest. Writes <output_dir>/bank (one safetensors file a proxy, index.json).
"""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from edgedit_hf.data import batch_indices
from edgedit_hf.diffusion import Diffusion, draws, drop_labels
from edgedit_hf.distill.closed_form import closed_form_block, combine_blocks, truncated_block
from edgedit_hf.distill.feature_loss import feature_loss
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import LayerSpec
from edgedit_hf.launch import check_fits_data, learning_rate_at, load_teacher, load_training_set, recipe_main, search_space_of, set_learning_rate
from edgedit_hf.models.transformer_edgedit import EdgeDiTTransformer2DModel
from edgedit_hf.recipes import RunConfig
from edgedit_hf.run_state import Facts, RunState, weights_hash
from edgedit_hf.search_space import SearchSpace

CLASS_DROPOUT = 0.1  # features are distilled with and without a class, as guidance will need both
CALIBRATION_STREAM, TEST_STREAM = 2, 3


@torch.no_grad()
def teacher_features(teacher, dataset, rows, seed, step, stream, depth, device):
    """Input of every layer up to `depth` (`[depth + 1]` tensors `(B, N, D)`; the last is the output) and the conditioning `(B, D)`."""
    batch = dataset.batch(batch_indices(len(dataset), rows, seed + stream, step))
    drawn = draws(seed, step, range(rows), batch["images"].shape[1:], stream=stream)
    diffusion, classes = Diffusion.for_config(teacher.config), teacher.config.num_classes
    t = diffusion.timesteps(drawn.time)
    labels = drop_labels(batch["labels"], drawn.drop, CLASS_DROPOUT, classes).to(device) if classes else None
    noisy = diffusion.noisy(batch["images"], drawn.noise, t)
    hidden, conditioning = teacher.embed(noisy.to(device), t.to(device), labels)
    features = [hidden]
    for block in teacher.blocks[:depth]:
        features.append(block(features[-1], conditioning))
    return features, conditioning


def share_pairs(space: SearchSpace, rank: int, world_size: int) -> list[int]:
    """Pairs of layers that a rank owns (a last odd layer counts as a pair): all cost alike, so they are dealt out in turn."""
    return list(range(rank, (space.num_layers + 1) // 2, world_size))


def start_block(teacher: EdgeDiTTransformer2DModel, bank: ProxyBank, layer: LayerSpec, features, conditioning, init: str):
    """A proxy before training."""
    sources = [teacher.blocks[i] for i in layer.source]
    if init == "closed_form":
        return closed_form_block(sources, features[layer.source[0]], conditioning, layer.attention_dim, layer.mlp_ratio)
    if init == "copy":
        return truncated_block(sources[0], layer.attention_dim, layer.mlp_ratio)
    block = bank.new_block(layer)
    for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return block


@torch.no_grad()
def losses(proxies: dict[str, tuple[LayerSpec, nn.Module]], features, conditioning, kind: str) -> dict[str, float]:
    """Feature loss of every proxy."""
    result = {}
    for key, (layer, block) in proxies.items():
        x, target = features[layer.source[0]], features[layer.source[-1] + 1]
        result[key] = feature_loss(block(x, conditioning), target, x, kind).item()
    return result


def run(config: RunConfig, accelerator: Accelerator) -> None:
    options, device = config.bank, accelerator.device
    dataset, _ = load_training_set(config, accelerator)
    teacher = load_teacher(config).transformer.to(device).eval().requires_grad_(False)
    check_fits_data(teacher.config, dataset)
    space = search_space_of(config, teacher.config)
    state = RunState(
        config.folder("bank"),
        "bank",
        config.section("data", "bank"),
        options.steps + options.both_steps,
        seed=config.seed,
        inputs={"teacher": weights_hash(teacher.state_dict()), "data": dataset.fingerprint},
        accelerator=accelerator,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        sharded=True,
    )
    if state.finished:
        return
    if accelerator.is_main_process:
        ProxyBank.create(state.folder, teacher, space)
    accelerator.wait_for_everyone()
    bank = ProxyBank(state.folder, teacher)

    pairs = share_pairs(space, accelerator.process_index, accelerator.num_processes)
    if not pairs:
        raise EdgeDiTError(f"{accelerator.num_processes} processes share {(space.num_layers + 1) // 2} pairs of layers; start at most that many.")
    owned = [layer for layer in space.proxies() if layer.source[0] // 2 in pairs]
    depth = max(layer.source[-1] for layer in owned) + 1
    single = [layer for layer in owned if space.option_of(layer) != "both"]
    both = [layer for layer in owned if space.option_of(layer) == "both"]

    def features_of(rows: int, step: int, stream: int):
        return teacher_features(teacher, dataset, rows, config.seed, step, stream, depth, device)

    torch.manual_seed(config.seed)
    calibration = features_of(options.calibration_samples, 0, CALIBRATION_STREAM)
    proxies = {bank.key(layer): (layer, start_block(teacher, bank, layer, *calibration, options.init).to(device)) for layer in owned}
    # Two optimisers with their own schedules; the losses of different proxies share no parameter, so one sum trains each on its own.
    modules = nn.ModuleDict({key: block for key, (_, block) in proxies.items()}).requires_grad_(True)
    phases = {}
    for name, layers in (("single", single), ("both", both)):
        parameters = [p for layer in layers for p in modules[bank.key(layer)].parameters()]
        phases[name] = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0, foreach=True)
    test = features_of(options.calibration_samples, 0, TEST_STREAM)
    before = Facts(losses(proxies, *test, options.loss))

    state.track(modules=modules, before=before, **phases)
    for step in state.steps():
        phase, layers, first, length = ("single", single, 0, options.steps)
        if step >= options.steps:
            phase, layers, first, length = ("both", both, options.steps, options.both_steps)
            if step == options.steps:
                before.update(combine(proxies, both, bank, test, options.loss))
        optimizer = phases[phase]
        set_learning_rate(optimizer, learning_rate_at(step - first, options.learning_rate, options.warmup_steps, length, 0.02))
        features, conditioning = features_of(options.batch_size, step, 0)
        total = 0.0
        for layer in layers:
            x, target = features[layer.source[0]], features[layer.source[-1] + 1]
            total = total + feature_loss(modules[bank.key(layer)](x, conditioning), target, x, options.loss)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.log(loss=total / len(layers))

    if options.both_steps == 0:
        before.update(combine(proxies, both, bank, test, options.loss))
    after = losses(proxies, *test, options.loss)
    entries = {}
    for key, (layer, block) in proxies.items():
        combined = space.option_of(layer) == "both"
        record = {
            "loss_before": before[key],
            "loss_after": after[key],
            "steps": options.both_steps if combined else options.steps,
            "seed": config.seed,
            "init": "combined" if combined else options.init,
        }
        entries[key] = bank.write_proxy(layer, block, record)
    gathered = gather_object([entries])
    if accelerator.is_main_process:
        bank.write_index({key: entry for part in gathered for key, entry in part.items()})
    state.finish(proxies=len(space.proxies()))


def combine(proxies, both: list[LayerSpec], bank: ProxyBank, test, kind: str) -> dict[str, float]:
    """Start every "both" from the trained attention and MLP proxies of the same layers; returns the losses then."""
    for layer in both:
        key = bank.key(layer)
        stem = key.removesuffix("both")
        combined = combine_blocks(proxies[stem + "attention"][1], proxies[stem + "mlp"][1])
        proxies[key][1].load_state_dict(combined.state_dict())
    return losses({bank.key(layer): proxies[bank.key(layer)] for layer in both}, *test, kind)


if __name__ == "__main__":
    recipe_main(run, __doc__)
