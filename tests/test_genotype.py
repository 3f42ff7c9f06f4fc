"""Genotype: what it accepts, that its JSON is canonical, and what it says to nonsense."""

import dataclasses
import json

import pytest

from edgedit_hf import Genotype
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import LayerSpec, Shape

LAYER = {"source": [0], "attention_dim": 32, "num_heads": 2, "mlp_ratio": 4.0}


def mixed() -> Genotype:
    return Genotype(
        (
            LayerSpec((0,), 32, 2, 4.0),
            LayerSpec((1,), 16, 2, 2.0),
            LayerSpec((2, 3), 32, 2, 2.0),
            LayerSpec((4,), 16, 2, 4.0),
        ),
        32,
    )


def test_json_and_layers_round_trip():
    genotype = mixed()
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert Genotype.from_layers(genotype.to_layers(), 32) == genotype
    assert Genotype.from_layers(json.loads(json.dumps(genotype.to_layers())), 32) == genotype
    assert Genotype.of({"layers": genotype.to_layers(), "hidden_size": 32, "num_classes": 10}) == genotype
    assert json.loads(genotype.to_json()) == {"hidden_size": 32, "layers": genotype.to_layers()}


def test_facts_about_a_genotype():
    genotype = mixed()
    assert genotype.num_teacher_layers == 5
    assert genotype.merged == [(2, 3)]
    original = Genotype.original(5, 32, 2)
    assert original.merged == [] and original.num_teacher_layers == 5
    assert original.layers[3] == LayerSpec((3,), 32, 2, 4.0)
    assert {layer.shape for layer in original.layers} == {Shape(32, 2, 4.0)}


def test_equal_genotypes_have_equal_text_and_hash_and_others_do_not():
    genotype = mixed()
    whole_numbers = Genotype(
        tuple(dataclasses.replace(layer, mlp_ratio=int(layer.mlp_ratio)) for layer in genotype.layers), 32
    )
    assert (
        whole_numbers == genotype
        and whole_numbers.to_json() == genotype.to_json()
        and whole_numbers.hash == genotype.hash
    )
    assert len(genotype.hash) == 16 and int(genotype.hash, 16) >= 0
    others = [
        Genotype.original(5, 32, 2),
        Genotype.original(4, 32, 2),
        Genotype.original(5, 32, 4),
        Genotype.original(5, 32, 2, 2.0),
    ]
    assert len({genotype.hash, *(other.hash for other in others)}) == 5


def test_what_the_paper_has_not_stands_in_the_text_only_where_it_is_used():
    plain, static, merging = (
        LayerSpec((0,), 32, 2, 4.0),
        LayerSpec((0,), 32, 2, 4.0, 0),
        LayerSpec((0,), 32, 2, 4.0, 3, 2),
    )
    assert plain.to_dict() == LAYER and static.to_dict() == {**LAYER, "modulation_rank": 0}
    assert merging.to_dict() == {**LAYER, "modulation_rank": 3, "token_merge": 2}
    for layer in (plain, static, merging):
        assert LayerSpec.from_dict(layer.to_dict()) == layer
    assert LayerSpec.from_dict({**LAYER, "modulation_rank": None, "token_merge": 1}) == plain
    genotypes = [Genotype((layer,), 32) for layer in (plain, static, merging)]
    assert len({genotype.hash for genotype in genotypes}) == 3
    assert [genotype.compressed for genotype in genotypes] == [False, True, True]
    assert Genotype.from_json(genotypes[2].to_json()) == genotypes[2]
    assert static.shape.timed == plain.shape and merging.shape.timed == Shape(32, 2, 4.0, None, 2)


def test_a_genotype_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixed().layers[0].mlp_ratio = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixed().hidden_size = 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": []}, r"source is \[\]"),
        ({"source": [-1]}, r"source is \[-1\]"),
        ({"source": [0, 2]}, r"source is \[0, 2\]; it must list consecutive"),
        ({"source": [1, 0]}, r"source is \[1, 0\]"),
        ({"source": 0}, "which is not a layer"),
        ({"source": [0.5]}, "0.5.*which is not a layer"),
        ({"attention_dim": 33}, "attention_dim 33 is not a positive multiple of num_heads 2"),
        ({"attention_dim": 0}, "attention_dim 0"),
        ({"attention_dim": 16.5}, "16.5.*which is not a layer"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"num_heads": "two"}, "two.*which is not a layer"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0.0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio is inf"),
        ({"mlp_ratio": "four"}, "four.*which is not a layer"),
        ({"source": [False]}, "which is not a layer: False is not a whole number"),
        ({"num_heads": True}, "which is not a layer: True is not a whole number"),
        ({"mlp_ratio": True}, "which is not a layer: True is not a number"),
        ({"mlp_ratio": "4"}, "which is not a layer: '4' is not a number"),
        ({"mlp_ratio": 10**400}, "which is not a layer"),
        ({"modulation_rank": False}, "which is not a layer: False"),
        ({"heads": 2}, "heads.*exactly.*num_heads"),
        ({"modulation_rank": -1}, "modulation_rank is -1; it must be 0"),
        ({"modulation_rank": 0.5}, "which is not a layer: .float"),
        ({"token_merge": 3}, r"token_merge is 3; it must be one of \(1, 2\)"),
        ({"token_merge": None}, "which is not a layer: .NoneType"),
    ],
)
def test_a_layer_that_makes_no_sense_is_refused(change, said):
    with pytest.raises(EdgeDiTError, match=said):
        LayerSpec.from_dict({**LAYER, **change})


def test_a_layer_with_a_missing_key_or_that_is_none_is_refused():
    with pytest.raises(EdgeDiTError, match=r"\['attention_dim', 'num_heads', 'source'\]"):
        LayerSpec.from_dict({key: LAYER[key] for key in ("source", "attention_dim", "num_heads")})
    with pytest.raises(EdgeDiTError, match="'a layer'"):
        LayerSpec.from_dict("a layer")


@pytest.mark.parametrize(
    "sources",
    [[], [[1]], [[0], [2]], [[0], [0]], [[1], [0]], [[0, 1], [1]], [[0], [1, 2], [4]]],
    ids=lambda sources: str(sources),
)
def test_every_teacher_layer_is_replaced_once_and_in_order(sources):
    with pytest.raises(EdgeDiTError, match="must replace teacher layers 0 … n-1 once each, in order"):
        Genotype.from_layers([{**LAYER, "source": source} for source in sources], 32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds list"),
        ('{"layers": []}', r"holds \['layers'\]; expected exactly"),
        ('{"hidden_size": 32, "layers": "all"}', "layers is 'all'"),
        ('{"hidden_size": "wide", "layers": []}', "hidden_size is 'wide'"),
        (json.dumps({"hidden_size": 0, "layers": [LAYER]}), "hidden_size is 0"),
    ],
)
def test_text_that_is_no_genotype_is_refused(text, said):
    with pytest.raises(EdgeDiTError, match=said):
        Genotype.from_json(text)


def test_a_modulation_of_more_than_full_rank_is_refused():
    with pytest.raises(EdgeDiTError, match="Layer 0: modulation_rank 33 is above the hidden_size 32"):
        Genotype.from_layers([{**LAYER, "modulation_rank": 33}], 32)


def test_a_layer_without_a_neuron_is_refused():
    with pytest.raises(EdgeDiTError, match="Layer 0: mlp_ratio 0.01 of hidden_size 32 leaves no neuron"):
        Genotype.from_layers([{**LAYER, "mlp_ratio": 0.01}], 32)
    assert Genotype.from_layers([{**LAYER, "mlp_ratio": 0.04}], 32).layers[0].mlp_ratio == 0.04
