"""What a run of the elastic family is made of: the supernet of its recipe."""

import json

import pytest

from edgedit_hf.elastic.supernet import new_elastic
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.models.transformer_elastic_dit import ElasticDiTTransformer2DModel
from edgedit_hf.run.config import RunConfig, load_config


def test_a_model_file_by_diffusers_may_hold_keys_of_others_and_one_by_hand_may_not(repository, tmp_path):
    net = ElasticDiTTransformer2DModel.from_preset("elastic-dit-debug")
    net.register_to_config(decay=0.99)  # as EMAModel.save_pretrained
    net.save_config(tmp_path)

    def make(file):
        config = load_config(
            repository / "training" / "recipes" / "debug-t2i.yaml", [f"output_dir={tmp_path}", f"elastic.model={file}"]
        )
        return new_elastic(config, [(1, 8, 8)], net.config.text_dims)

    made = make(tmp_path / "config.json")
    assert {name: p.shape for name, p in made.named_parameters()} == {
        name: p.shape for name, p in net.named_parameters()
    }
    values = {
        key: value
        for key, value in json.loads((tmp_path / "config.json").read_text()).items()
        if not key.startswith("_")
    }
    (tmp_path / "mine.json").write_text(json.dumps(values))
    with pytest.raises(EdgeDiTError, match="cannot be made: .*'decay'"):
        make(tmp_path / "mine.json")


@pytest.mark.parametrize("order", [["small=0.5", "tiny=0.375"], ["tiny=0.375", "small=0.5"]], ids=str)
def test_the_order_of_subnets_in_a_recipe_orders_nothing(repository, tmp_path, order):
    config = load_config(
        repository / "training" / "recipes" / "debug-t2i.yaml",
        [f"output_dir={tmp_path}", f"elastic.subnets=[{', '.join(order)}]"],
    )
    made = new_elastic(config, [(1, 8, 8)], [0, 0])
    assert list(made.config.subnets) == made.subnet_names == ["tiny", "small", "full"] == list(made.modulation)


def test_a_written_model_with_an_unknown_key_or_a_wrong_value_names_it(tmp_path):
    sizes = {"num_layers": [1, 1, 1], "num_attention_heads": 4, "attention_head_dim": 4, "text_dims": [4]}
    for more, message in (
        ({"depth": 3}, r"holds 'depth'; it may hold sample_size, "),
        ({"num_layers": [1, 1]}, "num_layers has 2 entries; it must have at least 3"),
        ({"rope_theta": "much"}, "rope_theta is 'much'"),
        ({"attention_head_dim": 6}, "cannot be made: attention_head_dim is 6"),
    ):
        config = RunConfig()
        config.elastic.model = str(tmp_path / "model.json")
        (tmp_path / "model.json").write_text(json.dumps({**sizes, **more}))
        with pytest.raises(EdgeDiTError, match=message):
            new_elastic(config, [(1, 8, 8)], [4])
