"""The proxy bank: what it writes, students assembled from it, and everything it refuses to open."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgedit_hf import Genotype, ProxyBank, SearchSpace
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import file_sha256, weights_hash

SPACE = SearchSpace(4, 32, 2)
RECORD = {"loss_before": 0.5, "loss_after": 0.1, "steps": 3, "seed": 0, "init": "random"}


def fill(bank: ProxyBank) -> ProxyBank:
    """Put random blocks everywhere."""
    generator = torch.Generator().manual_seed(1)
    entries = {}
    for layer in bank.space.proxies():
        block = bank.new_block(layer)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        entries[bank.key(layer)] = bank.write_proxy(layer, block, RECORD)
    bank.write_index(entries)
    return bank


@pytest.fixture(scope="module")
def teacher(make_transformer):
    return make_transformer()


@pytest.fixture
def bank(teacher, tmp_path) -> ProxyBank:
    return fill(ProxyBank.create(tmp_path / "bank", teacher, SPACE))


@torch.no_grad()
def output(model) -> torch.Tensor:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return model(x, torch.tensor([3.0, 500.0, 950.0]), torch.tensor([0, 9, 10])).sample


# -------------------------------------------------------------------- writing


def test_a_bank_is_one_file_a_proxy_and_an_index(bank, teacher):
    index = json.loads((bank.folder / "index.json").read_text())
    assert (
        index["teacher_hash"] == weights_hash(teacher.state_dict())
        and SearchSpace(**index["space"]).to_dict() == SPACE.to_dict()
    )
    assert len(index["entries"]) == len(SPACE.proxies()) == 4 * 3 + 2 * 4
    assert index["entries"]["02/mlp"] == {
        **RECORD,
        "file": "02-mlp.safetensors",
        "sha256": file_sha256(bank.folder / "02-mlp.safetensors"),
        "source": [2],
        "option": "mlp",
    }
    assert {"00/both", "03/attention", "00-01/original", "02-03/both"} <= set(
        index["entries"]
    ) and "00/original" not in index["entries"]
    files = {entry["file"] for entry in index["entries"].values()}
    assert {path.name for path in bank.folder.iterdir()} == files | {"index.json"}


def test_what_is_missing_is_known(teacher, tmp_path):
    bank = ProxyBank.create(tmp_path, teacher, SPACE)
    keys = [bank.key(layer) for layer in SPACE.proxies()]
    assert bank.missing() == keys
    layer = SPACE.proxies()[0]
    bank.write_index({keys[0]: bank.write_proxy(layer, bank.new_block(layer), RECORD)})
    assert bank.missing() == keys[1:] == ProxyBank(tmp_path, teacher).missing()


# -------------------------------------------------------------------- students


def test_the_original_genotype_is_the_teacher(bank, teacher):
    student = bank.assemble(Genotype.original(4, 32, 2))
    assert student is not teacher and torch.equal(output(student), output(teacher))
    assert weights_hash(student.state_dict()) == weights_hash(teacher.state_dict())


@pytest.mark.parametrize("seed", range(5))
def test_a_student_is_the_teachers_trunk_its_kept_layers_and_the_files_of_the_rest(bank, teacher, seed):
    genotype = SPACE.decode([random.Random(seed).random() for _ in range(3)] + [0.1 * seed])
    student = ProxyBank(bank.folder, teacher).assemble(genotype)
    assert (
        student.config.layers == genotype.to_layers()
        and student.config.num_layers == len(genotype.layers)
        and not student.training
    )
    for block, layer in zip(student.blocks, genotype.layers):
        if layer.shape == SPACE.option_shape("original") and len(layer.source) == 1:
            expected = teacher.blocks[layer.source[0]].state_dict()
        else:
            expected = load_file(bank.folder / bank.entries[bank.key(layer)]["file"])
        assert block.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in block.state_dict().items())
    trunk = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith("blocks.")}
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in trunk.items())
    # The same network, put together by hand.
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([1, 2])
    with torch.no_grad():
        tokens, conditioning = teacher.embed(x, t, labels)
        for layer in genotype.layers:
            block = bank.new_block(layer)
            block.load_state_dict(bank.load(layer))
            tokens = block(tokens, conditioning)
        assert torch.equal(student(x, t, labels).sample, teacher.unembed(tokens, conditioning, 8, 8))


def test_a_student_shares_no_memory_with_its_teacher(bank, teacher):
    before = weights_hash(teacher.state_dict())
    student = bank.assemble(SPACE.from_code((0, 5)))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert weights_hash(teacher.state_dict()) == before


def test_random_proxies_are_a_function_of_their_seed_alone(bank, teacher):
    genotype = SPACE.from_code((5, 18))  # layers 0 and 1 with the option "mlp", 2 and 3 merged
    torch.manual_seed(123)
    expected = torch.rand(4)
    torch.manual_seed(123)
    one, same = bank.assemble(genotype, random_seed=7), bank.assemble(genotype, random_seed=7)
    distilled, other = bank.assemble(genotype), bank.assemble(genotype, random_seed=8)
    assert torch.equal(torch.rand(4), expected)
    assert weights_hash(one.state_dict()) == weights_hash(same.state_dict())
    assert len({weights_hash(model.state_dict()) for model in (one, other, distilled)}) == 3
    trunk = [name for name in one.state_dict() if not name.startswith("blocks.")]
    assert all(torch.equal(one.state_dict()[name], teacher.state_dict()[name]) for name in trunk)
    assert not any(
        block.modulation.weight.any() for block in one.blocks
    )  # DiT's start: every new layer is the identity


def test_random_proxies_leave_kept_layers_as_they_are_and_need_no_files(teacher, tmp_path):
    empty = ProxyBank.create(tmp_path, teacher, SPACE)
    student = empty.assemble(SPACE.from_code((1, 16)), random_seed=0)
    kept = teacher.blocks[0].state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in student.blocks[0].state_dict().items())


def test_a_student_has_its_teachers_precision(teacher, tmp_path, make_transformer):
    half = make_transformer().to(torch.bfloat16)
    bank = fill(ProxyBank.create(tmp_path, half, SPACE))
    assert {p.dtype for p in bank.assemble(SPACE.from_code((5, 18))).parameters()} == {torch.bfloat16}


# -------------------------------------------------------------------- refusals


def test_the_bank_of_another_teacher_is_refused_with_both_hashes(bank, teacher, make_transformer):
    other = make_transformer(seed=1)
    hashes = (weights_hash(teacher.state_dict()), weights_hash(other.state_dict()))
    with pytest.raises(EdgeDiTError, match="teacher with hash {}, but the given teacher has {}".format(*hashes)):
        ProxyBank(bank.folder, other)


def test_all_missing_proxies_of_a_genotype_are_named(teacher, tmp_path):
    bank = ProxyBank.create(tmp_path / "bank", teacher, SPACE)
    genotype = SPACE.from_code((1, 19))  # layer 0 stays, layer 1 has a reduced MLP, 2 and 3 are one
    assert bank.missing(genotype) == ["01/mlp", "02-03/both"]
    with pytest.raises(
        EdgeDiTError, match="has no proxies '01/mlp', '02-03/both'; it holds 0 of 20 entries. Finish stage bank first"
    ):
        bank.assemble(genotype)
    layer = genotype.layers[1]
    bank.write_index({"01/mlp": bank.write_proxy(layer, bank.new_block(layer), RECORD)})
    with pytest.raises(EdgeDiTError, match="has no proxy '02-03/both'; it holds 1 of 20 entries"):
        ProxyBank(bank.folder, teacher).assemble(genotype)
    with pytest.raises(EdgeDiTError, match="has no proxy '02-03/both'"):
        bank.load(genotype.layers[2])
    assert bank.missing(SPACE.from_code((0, 0))) == [] and bank.assemble(SPACE.from_code((1, 0))) is not None


def change_entry(bank, key: str, **changes) -> None:
    index = json.loads((bank.folder / "index.json").read_text())
    index["entries"][key] = {**index["entries"][key], **changes}
    (bank.folder / "index.json").write_text(json.dumps(index))


def load(bank, teacher):
    """Open the bank anew and assemble a student that needs layer 1 with a reduced MLP."""
    return ProxyBank(bank.folder, teacher).assemble(SPACE.from_code((1, 0)))


@pytest.mark.parametrize(
    "cut", [lambda content: content[:1000], lambda content: b"", lambda content: content[:-1] + b"\x00\x01"]
)
def test_a_damaged_file_is_refused(bank, teacher, cut):
    path = bank.folder / "01-mlp.safetensors"
    content = path.read_bytes()
    path.write_bytes(cut(content))
    with pytest.raises(
        EdgeDiTError, match=f"01-mlp.safetensors .* has the SHA-256 .* index says {bank.entries['01/mlp']['sha256']}"
    ):
        load(bank, teacher)
    path.write_bytes(cut(content)[:1000])
    change_entry(bank, "01/mlp", sha256=file_sha256(path))  # even when the index vouches for it
    with pytest.raises(EdgeDiTError, match="01-mlp.safetensors cannot be read"):
        load(bank, teacher)
    path.unlink()
    with pytest.raises(EdgeDiTError, match="01-mlp.safetensors cannot be read .*No such file"):
        load(bank, teacher)


def test_a_proxy_of_another_layer_is_refused(bank, teacher):
    (bank.folder / "01-mlp.safetensors").write_bytes((bank.folder / "02-mlp.safetensors").read_bytes())
    with pytest.raises(EdgeDiTError, match="damaged or from another bank"):
        load(bank, teacher)


def test_a_proxy_of_another_shape_is_refused(bank, teacher):
    path = bank.folder / "01-mlp.safetensors"
    state = load_file(path)
    save_file({**state, "mlp.proj_in.bias": torch.zeros(3)}, path)
    change_entry(bank, "01/mlp", sha256=file_sha256(path))
    with pytest.raises(EdgeDiTError, match=r"01-mlp.safetensors holds .*\(3,\).*the layer .* needs .*\(64,\)"):
        load(bank, teacher)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "deep/01-mlp.safetensors", None])
def test_a_file_outside_the_bank_is_not_opened(bank, teacher, name):
    path = bank.folder / "01-mlp.safetensors"
    (bank.folder / "deep").mkdir()
    for copy in (bank.folder.parent / "outside.safetensors", bank.folder / "deep" / "01-mlp.safetensors"):
        copy.write_bytes(path.read_bytes())
    change_entry(bank, "01/mlp", file=name)
    with pytest.raises(EdgeDiTError, match="a proxy's file must lie in the bank's own folder|None cannot be read"):
        load(bank, teacher)


@pytest.mark.parametrize(
    ("genotype", "said"),
    [
        (Genotype.original(6, 32, 2), "replaces 6 layers of width 32, but the teacher has 4 of width 32"),
        (Genotype.original(4, 64, 2), "of width 64"),
        (Genotype.original(4, 32, 4), "belongs to another teacher or another search space"),
        (SearchSpace(4, 32, 2, reduced_mlp_ratio=3.0).from_code((5, 0)), "shape .32, 2, 3.0. .* another search space"),
    ],
)
def test_a_genotype_of_another_teacher_is_refused(bank, genotype, said):
    with pytest.raises(EdgeDiTError, match=said):
        bank.assemble(genotype)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "index.json does not exist; it is written by stage bank"),
        ("{", "is not JSON"),
        ("[]", "has the format 'list'"),
        ('{"format": "another"}', "has the format 'another'; expected"),
        ('{"format": "edgedit-proxy-bank-1"}', "expected a whole 'edgedit-proxy-bank-1'"),
    ],
)
def test_a_folder_that_is_no_bank_is_refused(teacher, tmp_path, content, said):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(EdgeDiTError, match=said):
        ProxyBank(tmp_path, teacher)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_whose_weights_are_not_finite_makes_no_bank_and_the_layer_is_named(make_transformer, tmp_path, value):
    broken = make_transformer()
    with torch.no_grad():
        broken.blocks[1].mlp.proj_in.weight[3, 3] = value
    with pytest.raises(EdgeDiTError, match="teacher of the bank: 1 of .*blocks.1.mlp.proj_in.weight"):
        ProxyBank.create(tmp_path, broken, SearchSpace.for_config(broken.config))
    assert not list(tmp_path.iterdir())


def test_a_teacher_whose_layers_are_all_zero_makes_no_bank_and_they_are_named(make_transformer, tmp_path):
    empty = make_transformer()
    with torch.no_grad():
        for parameter in empty.blocks[2].parameters():
            parameter.zero_()
    with pytest.raises(EdgeDiTError, match="teacher of the bank: every weight of its layer blocks.2 is 0"):
        ProxyBank.create(tmp_path, empty, SearchSpace.for_config(empty.config))
