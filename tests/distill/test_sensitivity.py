"""Single changes of a teacher: which there are, and that a student with shared weights computes what an assembled one
would.
"""

import copy

import pytest
import torch

from edgedit_hf import EdgeDiTTransformer2DModel
from edgedit_hf.distill.closed_form import truncated_block
from edgedit_hf.distill.sensitivity import disjoint, relative_output_error, single_changes, spliced_student
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import LayerSpec


def test_the_changes_of_dit_xl_are_the_papers():
    with torch.device("meta"):
        config = EdgeDiTTransformer2DModel.from_preset("DiT-XL/2").config
    changes = single_changes(config)
    assert {name: len(layers) for name, layers in changes.items()} == {
        "MLP ratio 1": 28,
        "MLP ratio 2": 28,
        "MLP ratio 3": 28,
        "attention 512": 28,
        "attention 768": 28,
        "merge 2 → 1": 27,
        "merge 3 → 1": 26,
    }
    assert changes["MLP ratio 3"][5] == LayerSpec((5,), 1152, 16, 3.0)
    assert changes["attention 768"][0] == LayerSpec((0,), 768, 16, 4.0)
    assert changes["merge 3 → 1"][2] == LayerSpec((2, 3, 4), 1152, 16, 4.0)
    assert [layer.source for layer in disjoint(changes["merge 3 → 1"])] == [(i, i + 1, i + 2) for i in range(0, 27, 3)]
    assert disjoint(changes["MLP ratio 1"]) == changes["MLP ratio 1"]


def test_small_teachers_have_no_change_twice_and_none_that_changes_nothing():
    config = EdgeDiTTransformer2DModel.from_preset("DiT-debug/2", num_layers=2, mlp_ratio=2.0).config
    changes = single_changes(config)  # 4/9 and 2/3 of 32 are both nearest to 16; there are no three layers
    assert list(changes) == ["MLP ratio 1", "attention 16", "merge 2 → 1"]


def test_merges_do_not_cross_a_long_skips_end():
    config = EdgeDiTTransformer2DModel.from_preset("DiT-debug/2", long_skips=[[0, 3]]).config
    changes = single_changes(config)
    assert [layer.source for layer in changes["merge 2 → 1"]] == [(1, 2)] and "merge 3 → 1" not in changes


def test_a_compressed_teacher_is_refused():
    with torch.device("meta"):
        config = EdgeDiTTransformer2DModel.from_preset("EdgeDiT-1").config
    with pytest.raises(
        EdgeDiTError, match="3 merged layers and 1 layer shapes; the study needs an uncompressed teacher"
    ):
        single_changes(config)


@pytest.mark.parametrize("extra", [{}, {"long_skips": [[0, 3]], "learned_position": True}], ids=["DiT", "skips"])
@torch.no_grad()
def test_a_spliced_student_is_the_assembled_one_and_leaves_the_teacher_alone(make_transformer, extra):
    teacher = make_transformer(num_layers=4, **extra)
    config = teacher.config
    heads = config.layers[0]["num_heads"]
    narrow, merged = LayerSpec((0,), 8 * heads, heads, 2.0), LayerSpec((1, 2), config.hidden_size, heads, 4.0)
    blocks = [(narrow, truncated_block(teacher.blocks[0], narrow)), (merged, copy.deepcopy(teacher.blocks[2]))]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = spliced_student(teacher, blocks)
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    whole = type(teacher)(**{**plain, "layers": [narrow.to_dict(), merged.to_dict(), config.layers[3]]})
    state = {k: v for k, v in teacher.state_dict().items() if not k.startswith("blocks.")}
    for index, block in enumerate([blocks[0][1], blocks[1][1], teacher.blocks[3]]):
        state |= {f"blocks.{index}.{k}": v for k, v in block.state_dict().items()}
    whole.load_state_dict(state)
    size = config.sample_size
    noisy = torch.randn(3, config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    inputs = noisy, torch.tensor([10, 500, 900]), torch.tensor([0, 1, 2])
    reference = teacher(*inputs).sample
    assert torch.equal(student(*inputs).sample, whole.eval()(*inputs).sample)
    assert student.blocks[2] is teacher.blocks[3] and len(teacher.blocks) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())

    errors = relative_output_error(student, *inputs, reference)
    changed = student(*inputs).sample[:, : config.in_channels]
    kept = reference[:, : config.in_channels]
    expected = [(((a - b) ** 2).sum() / (b**2).sum()).item() for a, b in zip(changed, kept)]
    assert errors.tolist() == pytest.approx(expected, rel=1e-4) and min(expected) > 0
    assert relative_output_error(spliced_student(teacher, []), *inputs, reference).tolist() == [0.0, 0.0, 0.0]
