"""What distillation takes, before anything runs: the forwards that are counted are those that are made."""

import pytest
import torch

from edgedit_hf.few_step.cost import activation_bytes, few_step_estimate, forwards, meta_networks
from edgedit_hf.few_step.knowledge import own_knowledge
from edgedit_hf.few_step.networks import STUDENT, Networks
from edgedit_hf.few_step.objective import Objective
from edgedit_hf.run.config import RunConfig
from edgedit_hf.run.cost import BACKWARD, Machine
from edgedit_hf.search_space import TEXT_TOKENS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"matching_weight": 0.0},
        {"knowledge_weight": 0.0},
        {"student_every": 4},
        {"student_every": 4, "schedule": "alternate"},
        {"knowledge_steps": 2, "knowledge_guidance": 1.0},
        {"real_guidance": 2.0},
        {"real_guidance": 2.0, "decoupled": False, "student_every": 2},
    ],
)
def test_forwards_are_those_of_a_step(families, options):
    """Rows through the net, summed over a cycle of the schedule at every one of the student's steps."""
    family, config = families["edgedit"], RunConfig()
    for name, value in {"knowledge_steps": 3, **options}.items():
        setattr(config.few_step, name, value)
    options = config.few_step
    guidance = 1.5 if options.knowledge_guidance is None else options.knowledge_guidance
    matched = options.real_guidance or 1.0
    source = family.source(matched, guidance)
    networks = Networks(source.pipeline.transformer, True, options.matching_weight > 0, rank=2, alpha=2.0)
    rows = []
    networks.base.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    knowledge = own_knowledge(config, source, networks) if options.knowledge_weight else None
    objective = Objective(networks, source, options, knowledge, (), 0)
    piece, learned, width = family.piece([0, 1]), 0, None
    for k in range(4):
        for step in range(options.student_every):
            student = step == 0
            x_t = objective.student_input(piece, step, k, width)
            if student:
                _, x0, _ = objective.student_loss(piece, x_t, step, k, width)
            else:
                x0 = objective.sample(piece, x_t, k, width)
            critic = options.matching_weight > 0 and not (options.schedule == "alternate" and student)
            if critic:
                objective.critic_loss(piece, x0, step, width)
            learned += student + critic
    steps = 4 * options.student_every
    made = sum(rows) / 2 / steps + BACKWARD * learned / steps
    judged = options.samples * 4 / (options.evaluate_every * options.batch_size)
    assert forwards(options, guidance > 1, matched > 1) == pytest.approx(made + judged)


def test_the_estimate_counts_time_and_memory(families):
    family, config = families["elastic"], RunConfig()
    machine = Machine("here", 1, 1e9, 1e9, 1e9, 1e9)
    model = family.model
    weights = sum(p.numel() for p in family.pipeline.transformer.parameters())
    estimate = few_step_estimate(config, machine, model, 2e6, True, 1e6)
    options = config.few_step
    work = options.steps * forwards(options, True, True) * options.batch_size * 2e6 / 1e9
    assert work < estimate.seconds < 1.2 * work
    with torch.device("meta"):
        again = type(model).from_config(model.config)
    held, batch = sum(meta_networks(again, options).memory().values()), options.batch_size * 1e6
    assert held + batch < estimate.memory < held + batch + 1e9
    assert estimate.disk == 4 * weights


@pytest.mark.parametrize("backbone", ["adapters", "full"])
def test_activations_are_what_a_forward_keeps(family, backbone):
    """Counted on real tensors, of one image at the net's own size; less of them where they are computed again."""
    options = RunConfig().few_step
    options.backbone, options.rank, options.alpha = backbone, 4, 8.0
    model = family.model
    counted = activation_bytes(model, options)
    options.gradient_checkpointing = True
    assert activation_bytes(model, options) < 0.9 * counted
    networks = Networks(model, backbone == "adapters", False, 4, 8.0)
    weights = {p.untyped_storage().data_ptr() for p in networks.parameters()}
    config, kept = model.config, {}
    x = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
    condition: dict = {"class_labels": torch.tensor([1])}
    if family.name == "elastic":
        texts = [torch.randn(1, TEXT_TOKENS, dim) for dim in config.text_dims]
        masks = [torch.ones(1, TEXT_TOKENS, dtype=torch.bool) for _ in texts]
        condition = {"encoder_hidden_states": texts, "encoder_attention_mask": masks}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        networks(STUDENT, x, torch.tensor([500]), condition)[0].square().mean()
    assert counted == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.02)
