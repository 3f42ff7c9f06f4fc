"""The recipe schema: what it reads, what it refuses and how it says so, and the recipe that it writes itself."""

import dataclasses

import pytest
import yaml

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.recipes import RunConfig, commented_yaml, load_config


@pytest.fixture
def load(tmp_path):
    """`load(text, *overrides)`: the config of a recipe with this text."""

    def read(text: str = "", *overrides: str) -> RunConfig:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return read


def test_keys_that_are_left_out_have_their_defaults(load):
    assert load("") == load("# nothing") == load("teacher:\nbank:\n") == RunConfig()
    config = load("seed: 3\nteacher: {steps: 7, learning_rate: 1e-4}\nexport: {dtypes: [fp32]}\n")
    assert (config.seed, config.teacher.steps, config.teacher.learning_rate, config.export.dtypes) == (3, 7, 1e-4, ["fp32"])
    config.seed, config.export.dtypes = 0, ["fp32", "int8"]
    config.teacher = dataclasses.replace(config.teacher, steps=1000, learning_rate=1e-3)
    assert config == RunConfig()


def test_defaults_are_not_shared_between_runs(load):
    load("").export.dtypes.append("int4")
    assert load("").export.dtypes == ["fp32", "int8"]


@pytest.mark.parametrize("name", ["debug.yaml", "debug-quantize.yaml", "digits.yaml", "imagenet256-edgedit1.yaml"])
def test_the_shipped_recipes_are_valid(repository, name):
    assert load_config(repository / "training" / "recipes" / name) != RunConfig()


def test_the_paper_recipe_gives_and_explains_every_key_of_its_stages(repository):
    path = repository / "training" / "recipes" / "imagenet256-edgedit1.yaml"
    values, lines = yaml.safe_load(path.read_text()), path.read_text().splitlines()
    config = load_config(path)
    text_to_image = {"text", "elastic", "knowledge"}  # stages of the other family
    for entry in dataclasses.fields(config):
        if entry.name in text_to_image:
            continue
        section = getattr(config, entry.name)
        keys = [entry.name] if not dataclasses.is_dataclass(section) else [key.name for key in dataclasses.fields(section)]
        if dataclasses.is_dataclass(section):
            assert set(keys) == set(values[entry.name]), entry.name
        for key in keys:
            assert any(line.strip().startswith(f"{key}: ") and "  # " in line for line in lines), key
    assert (config.tune.steps, config.evaluate.samples, config.teacher.steps) == (100_000, 50_000, 400_000)
    assert (config.teacher.hidden_size, config.teacher.num_layers, config.bank.reduced_attention_dim, config.bank.only) == (1152, 28, 512, None)


def test_sections_and_folders(load):
    config = load("output_dir: runs/x")
    assert config.section("search", "export") == {
        "search": dataclasses.asdict(config.search),
        "export": {"dtypes": ["fp32", "int8"], "executorch": [], "threads": 2},
    }
    assert str(config.folder("evaluate", "grid.png")) == "runs/x/evaluate/grid.png"


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("techer: {}", "unknown key 'techer'; did you mean 'teacher'"),
        ("teacher: {stps: 3}", "unknown key 'teacher.stps'; did you mean 'steps'"),
        ("teacher: {xyzzy: 3}", "unknown key 'teacher.xyzzy'; the keys there are steps, batch_size"),
        ("3: x", "unknown key '3'"),
        ("teacher: 3", "teacher holds int; it must hold keys and values"),
        ("[teacher]", "the file holds list; it must hold keys and values"),
        ("teacher: {steps: many}", r"teacher.steps is 'many' \(str\); it must be int"),
        ("teacher: {steps: 1.5}", r"teacher.steps is 1.5 \(float\); it must be int"),
        ("teacher: {steps: true}", r"teacher.steps is True \(bool\); it must be int"),
        ("teacher: {steps: null}", r"teacher.steps is None \(NoneType\); it must be int"),
        ("teacher: {learning_rate: fast}", r"teacher.learning_rate is 'fast' \(str\); it must be float"),
        ("teacher: {learning_rate: true}", r"teacher.learning_rate is True \(bool\); it must be float"),
        ("teacher: {learn_sigma: 1}", r"teacher.learn_sigma is 1 \(int\); it must be bool"),
        ("data: {source: 3}", r"data.source is 3 \(int\); it must be str"),
        ("data: {resolution: big}", r"data.resolution is 'big' \(str\); it must be int or null"),
        ("export: {dtypes: fp32}", r"export.dtypes is 'fp32' \(str\); it must be list"),
        ("export: {dtypes: [8]}", r"export.dtypes is \[8\] \(list\); it must be list"),
        ("teacher: {steps: 0}", "teacher.steps is 0; it must be at least 1"),
        ("teacher: {learning_rate: -1e-3}", "teacher.learning_rate is -0.001; it must be at least 0"),
        ("teacher: {learning_rate: .nan}", "teacher.learning_rate is nan; it must be at least 0"),
        ("data: {channels: 2}", "data.channels is 2; it must be one of None, 1, 3"),
        ("search: {acquisition: ei}", "search.acquisition is 'ei'; it must be one of qlogehvi, qlognehvi, ehvi"),
        ("teacher: {hidden_size: 128, num_heads: 5}", "teacher.hidden_size 128 is not a multiple of teacher.num_heads 5"),
        ("teacher: {hidden_size: 30, num_heads: 3}", "teacher.hidden_size 30 is not a multiple of 4"),
        ("teacher: {prediction_type: flow_prediction, learn_sigma: true}", "learn_sigma needs teacher.prediction_type epsilon"),
        ("search: {initial: 9, evaluations: 8}", "search.initial 9 exceeds search.evaluations 8"),
        ("export: {dtypes: [fp32, int3]}", "export.dtypes holds 'int3'; it may hold fp32, int8"),
        ("export: {executorch: [int3]}", "export.executorch holds 'int3'; it may hold fp32, int8, int4"),
        ("latency: {precision: int4}", "latency.precision int4 needs latency.runtime executorch"),
        ("quantize: {budget_bits: 3.9}", "quantize.budget_bits is 3.9; it must be at least 4"),
        ("quantize: {budget_bits: 8.5}", "quantize.budget_bits is 8.5; it must be at most 8"),
        ("a: [", "is not YAML"),
        ("? [a, b]\n: 3", "is not YAML"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(load, tmp_path, text, said):
    with pytest.raises(EdgeDiTError, match=said) as refused:
        load(text)
    assert str(tmp_path / "recipe.yaml") in str(refused.value)


def test_a_recipe_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(EdgeDiTError, match=r"none.yaml cannot be read \(No such file.*`edgedit recipes copy DIR`"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(EdgeDiTError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(EdgeDiTError, match="binary.yaml is not YAML"):
        load_config(tmp_path / "binary.yaml")


# -------------------------------------------------------------------- overrides


def test_overrides_are_yaml_and_the_last_one_counts(load):
    config = load(
        "teacher: {steps: 7}",
        "teacher.steps=8",
        "teacher.steps=9",
        "seed=4",
        "data.resolution=16",
        "data.source=a=b",
        "tune.learning_rate=1e-5",
        "student.max_latency_ratio=null",
        "export.dtypes=[int8]",
        "teacher.learn_sigma=true",
        "bank={steps: 3, both_steps: 2}",
    )
    assert (config.teacher.steps, config.seed, config.data.resolution, config.data.source) == (9, 4, 16, "a=b")
    assert (config.tune.learning_rate, config.student.max_latency_ratio, config.export.dtypes) == (1e-5, None, ["int8"])
    assert config.teacher.learn_sigma is True and (config.bank.steps, config.bank.both_steps) == (3, 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher.steps", "'teacher.steps' has no '='; write section.key=value"),
        ("teacher.stps=3", "--override: unknown key 'teacher.stps'; did you mean 'steps'"),
        ("teacher.steps.more=3", r"--override: teacher.steps is \{'more': 3\} \(dict\); it must be int"),
        ("teacher=3", "--override: teacher holds int"),
        ("teacher.steps=0", "--override: teacher.steps is 0; it must be at least 1"),
        ("data.source=[a", r"--override 'data.source=\[a': the value is not YAML"),
        ("=3", "unknown key ''"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(load, override, said):
    with pytest.raises(EdgeDiTError, match=said):
        load("", override)


# -------------------------------------------------------------------- writing


def test_the_written_recipe_is_the_defaults_with_every_key_explained(load):
    text = commented_yaml()
    assert load(text) == RunConfig()
    values, lines = yaml.safe_load(text), text.splitlines()
    for entry in dataclasses.fields(RunConfig):
        section = getattr(RunConfig(), entry.name)
        if not dataclasses.is_dataclass(section):
            assert any(line.startswith(f"{entry.name}: ") and line.endswith(f"  # {entry.metadata['doc']}") for line in lines)
            continue
        assert f"{entry.name}:  # {type(section).__doc__}" in lines
        for key in dataclasses.fields(section):
            assert key.metadata["doc"] and key.name in values[entry.name]
            assert any(line.startswith(f"  {key.name}: ") and line.endswith(f"  # {key.metadata['doc']}") for line in lines)


@pytest.mark.parametrize("path", ["runs/x", "org/name", "a b: c # d", "über", "null", "3", "'quoted'", "1e-3", "- x", "C:\\x"])
def test_given_values_are_written_so_that_they_read_back(load, path):
    config = load(commented_yaml([f"teacher.path={path}", f"output_dir={path}"]))
    assert config.teacher.path == config.output_dir == path
    assert dataclasses.replace(config, output_dir="runs/edgedit", teacher=RunConfig().teacher) == RunConfig()
