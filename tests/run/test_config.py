"""The recipe schema: what it reads, what it refuses and how it says so, and the recipe that it writes itself."""

import dataclasses

import pytest
import yaml

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.run.config import RunConfig, commented_yaml, load_config, unused


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
    assert (config.seed, config.teacher.steps, config.teacher.learning_rate, config.export.dtypes) == (
        3,
        7,
        1e-4,
        ["fp32"],
    )
    config.seed, config.export.dtypes = 0, ["fp32", "int8"]
    config.teacher = dataclasses.replace(config.teacher, steps=1000, learning_rate=1e-3)
    assert config == RunConfig()


def test_defaults_are_not_shared_between_runs(load):
    load("").export.dtypes.append("int4")
    assert load("").export.dtypes == ["fp32", "int8"]


@pytest.mark.parametrize(
    "name", ["debug.yaml", "debug-menu.yaml", "debug-quantize.yaml", "digits.yaml", "imagenet256-edgedit1.yaml"]
)
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
        keys = (
            [entry.name] if not dataclasses.is_dataclass(section) else [key.name for key in dataclasses.fields(section)]
        )
        if dataclasses.is_dataclass(section):
            assert set(keys) == set(values[entry.name]), entry.name
        for key in keys:
            assert any(line.strip().startswith(f"{key}: ") and "  # " in line for line in lines), key
    assert (config.tune.steps, config.evaluate.samples, config.teacher.steps) == (100_000, 50_000, 400_000)
    assert (
        config.teacher.hidden_size,
        config.teacher.num_layers,
        config.bank.reduced_attention_dim,
        config.bank.only,
    ) == (1152, 28, 512, None)


def test_sections_and_folders(load):
    config = load("output_dir: runs/x")
    assert config.section("search", "export") == {
        "search": dataclasses.asdict(config.search),
        "export": {"dtypes": ["fp32", "int8"], "executorch": [], "web": [], "tolerance": None, "threads": 2},
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
        (
            "search: {mode: exact, max_latency_ratio: 0.6}",
            "search.max_latency_ratio is 0.6, but search.mode is exact; only joint",
        ),
        (
            "search: {mode: two-stage, max_parameters_ratio: 0.6}",
            "search.max_parameters_ratio is 0.6, but search.mode is two-stage",
        ),
        ("search: {mode: exact, max_memory_mb: 9}", "search.max_memory_mb is 9.0, but .* with student.max_memory_mb"),
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
        (
            "teacher: {hidden_size: 128, num_heads: 5}",
            "teacher.hidden_size 128 is not a multiple of teacher.num_heads 5",
        ),
        ("teacher: {hidden_size: 30, num_heads: 3}", "teacher.hidden_size 30 is not a multiple of 4"),
        (
            "teacher: {prediction_type: flow_prediction, learn_sigma: true}",
            "learn_sigma needs teacher.prediction_type epsilon",
        ),
        ("search: {initial: 9, evaluations: 8}", "search.initial 9 exceeds search.evaluations 8"),
        ("export: {dtypes: [fp32, int3]}", "export.dtypes holds 'int3'; it may hold fp32, int8"),
        ("export: {executorch: [int3]}", "export.executorch holds 'int3'; it may hold fp32, int8, int4"),
        ("bank: {menu: mlp2}", r"bank.menu is 'mlp2' \(str\); it must be list of keys and values or null"),
        ("bank: {menu: []}", "bank.menu has 0 entries; it must have at least 1"),
        ("bank: {menu: [{merge: 4}]}", r"bank.menu\[0\].merge is 4; it must be at most 3"),
        ("bank: {menu: [{mlp_ration: 2}]}", r"section bank: menu\[0\] is .*; did you mean 'mlp_ratio'"),
        ("bank: {menu: [{num_heads: 3}]}", "section bank: menu.*attention_dim 128 is not .* num_heads 3"),
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
            assert any(
                line.startswith(f"{entry.name}: ") and line.endswith(f"  # {entry.metadata['doc']}") for line in lines
            )
            continue
        assert f"{entry.name}:  # {' '.join(type(section).__doc__.split())}" in lines
        for key in dataclasses.fields(section):
            assert key.metadata["doc"] and key.name in values[entry.name]
            assert any(
                line.startswith(f"  {key.name}: ") and line.endswith(f"  # {key.metadata['doc']}") for line in lines
            )


@pytest.mark.parametrize(
    "path", ["runs/x", "org/name", "a b: c # d", "über", "null", "3", "'quoted'", "1e-3", "- x", "C:\\x"]
)
def test_given_values_are_written_so_that_they_read_back(load, path):
    config = load(commented_yaml([f"teacher.path={path}", f"output_dir={path}"]))
    assert config.teacher.path == config.output_dir == path
    assert dataclasses.replace(config, output_dir="runs/edgedit", teacher=RunConfig().teacher) == RunConfig()


# -------------------------------------------------------------------- every key, every kind of value


KEYS = [
    (section.name, entry)
    for section in dataclasses.fields(RunConfig)
    for entry in (
        dataclasses.fields(getattr(RunConfig(), section.name))
        if dataclasses.is_dataclass(getattr(RunConfig(), section.name))
        else [section]
    )
]
VALUES = {
    "nan": ".nan",
    "inf": ".inf",
    "beyond floats": "1e400",
    "minus one": "-1",
    "beyond 64 bits": str(2**64),
    "beyond all bounds": "0x" + "f" * 10_000,
    "too many digits": "9" * 5000,
    "empty": "''",
    "blank": "'   '",
    "a NUL": '"a\\0b"',
    "a line break": '"a\\nb"',
    "half a pair": '"\\ud800"',
    "a list": "[]",
    "numbers": "[1, 2]",
    "keys": "{a: 1}",
    "deep": "[" * 15 + "]" * 15,
    "deeper": "[" * 3000,
    "a date": "2026-01-01",
    "no date": "2026-99-99",
    "tagged": "!!timestamp x",
    "code": "!!python/object/apply:os.system [true]",
    "bytes": "!!binary aGk=",
    "no boolean": "!!bool x",
    "a long name": "x" * 5000,
    "a long part": "x" * 300 + "/y",
    "very long": "y" * 2_000_000,
}


PARSED = (
    "very long",
    "deep",
    "deeper",
    "too many digits",
    "tagged",
    "code",
    "bytes",
    "no boolean",
)  # decided before any key is looked at


def test_no_value_of_any_key_ends_in_another_error_or_is_taken_beyond_its_range(load):
    for section, entry in KEYS:
        name = entry.name if section == entry.name else f"{section}.{entry.name}"
        kind, rule = str(entry.type), entry.metadata["rule"]
        for label, value in VALUES.items():
            if label in PARSED and name not in ("output_dir", "teacher.steps"):
                continue
            try:
                config = load("", f"{name}={value}")
            except EdgeDiTError as error:
                assert len(str(error)) < 1000 and "\n" not in str(error), (name, label, str(error))
                continue
            taken = getattr(config, name) if "." not in name else getattr(getattr(config, section), entry.name)
            if isinstance(taken, str):
                assert "str" in kind and rule.length[0] <= len(taken) <= rule.length[1], (name, label)
                assert (
                    label in ("nan", "inf", "a date", "no date", "beyond floats", "a long part") or rule.length[0] == 0
                ), (name, label)
                assert label != "a long part" or not rule.path, name
            elif isinstance(taken, list):
                numbers = label == "numbers" and "float" in kind
                assert (label == "a list" or numbers) and "list" in kind, (name, label)
            else:
                assert label == "beyond 64 bits" and rule.maximum == 1e38, (name, label, taken)


def test_every_number_has_both_ends_of_a_range():
    for section, entry in KEYS:
        rule = entry.metadata["rule"]
        if "int" in str(entry.type) or "float" in str(entry.type):
            low, high = (
                rule.minimum if rule.above is None else rule.above,
                rule.maximum if rule.below is None else rule.below,
            )
            assert rule.choices or low is not None and high is not None, (section, entry.name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tune: {ema_decay: 2}", "tune.ema_decay is 2.0; it must be below 1.0"),
        ("data: {validation_fraction: 1}", "data.validation_fraction is 1.0; it must be below 1.0"),
        ("text: {mask_share: 5}", "text.mask_share is 5.0; it must be at most 1.0"),
        ("student: {max_flops_ratio: 0}", "student.max_flops_ratio is 0.0; it must be above 0.0"),
        ("tune: {output_kd: 1e39}", "tune.output_kd is 1e\\+39; it must be at most 1e\\+38"),
        ("sampling: {steps: 1001}", "sampling.steps is 1001; it must be at most 1000"),
        ("latency: {table: []}", "latency.table has 0 entries; it must have at least 1"),
        ("latency: {table: [a.json, 7]}", r"latency.table is \['a.json', 7\] \(list\); it must be list of str or str"),
        ("latency: {table: a.json, weights: [1.0]}", "latency.weights holds 1 numbers, latency.table 0 tables"),
        ("latency: {table: [a.json, b.json], weights: [1.0, 0.0]}", r"latency.weights\[1\] is 0.0; it must be above 0"),
        (f"seed: {2**63}", f"seed is {2**63}; it must be at most {2**63 - 1}"),
        ("output_dir: ''", "output_dir is ''; it must not be empty"),
        (
            "bank: {reduced_mlp_ratio: 0.005}",
            r"bank.reduced_mlp_ratio 0.005 leaves an MLP of teacher.hidden_size 128 no neuron; it must be at least "
            r"0.00781",
        ),
        ("bank: {reduced_attention_dim: 30}", "bank.reduced_attention_dim 30 is not a multiple of teacher.num_heads 4"),
        ("elastic: {subnets: [../x=0.5]}", "elastic.subnets holds '../x=0.5'; it may hold name=width"),
        ("data: {split: test}", "data.split is 'test', but data.source is 'digits'"),
        ("data: {label_column: x}", "data.label_column is 'x', but data.source is 'digits'"),
        ("knowledge: {quantization: 4bit}", "knowledge.quantization is '4bit', but knowledge.teacher is null"),
        ("quantize: {group_size: 32}", "quantize.group_size is 32, but quantize.scheme is 'palette'"),
        (
            "quantize: {rows_per_palette: 8, scheme: affine}",
            "quantize.rows_per_palette is 8, but quantize.scheme is 'affine'",
        ),
        ("elastic: {balance: none, balance_limit: 3}", "elastic.balance_limit is 3.0, but elastic.balance is 'none'"),
        ("seed: 1\nseed: 2", "the key 'seed' stands there twice"),
        ("teacher: {steps: 3}\ntune: {steps: 3, steps: 4}", "the key 'steps' stands there twice"),
        ("seed: 1\n---\nseed: 2", "is not YAML: expected a single document"),
        ("\tseed: 1", "is not YAML"),
        ("? {a: b}\n: 1", "is not YAML"),
        ("a: &a [*a]", "is not YAML: it holds itself"),
        ("a: " + "[" * 400 + "]" * 400, "is not YAML: it is nested more than 20 deep"),
        (
            "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
            "more than 10000 values",
        ),
        (
            "a0: &a0 {x: 1}\n"
            + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 18)),
            "more than 10000 values",
        ),
        ("# " + "x" * 2**18, "has more than 262144 bytes"),
    ],
)
def test_what_cannot_work_or_is_never_read_is_refused(load, text, said):
    with pytest.raises(EdgeDiTError, match=said):
        load(text)


def test_anchors_and_dates_that_are_meant_are_read(load):
    config = load("output_dir: 2026-01-01\nteacher: &long {steps: 5, ema_decay: 0.9}\ntune:\n  <<: *long\n  steps: 7\n")
    assert (config.output_dir, config.teacher.steps, config.tune.steps, config.tune.ema_decay) == (
        "2026-01-01",
        5,
        7,
        0.9,
    )


@pytest.mark.parametrize(
    "name",
    [
        "debug.yaml",
        "debug-menu.yaml",
        "debug-t2i.yaml",
        "digits-t2i.yaml",
        "digits-few-step.yaml",
        "digits-t2i-few-step.yaml",
        "debug-quantize.yaml",
        "digits.yaml",
        "imagenet256-edgedit1.yaml",
    ],
)
def test_the_shipped_recipes_and_the_written_one_go_on_working(repository, tmp_path, name):
    path = repository / "training" / "recipes" / name
    assert load_config(
        path, ["student.genotype=EdgeDiT-1", "bank.only=[EdgeDiT-1]", "text.encoder=a/b", "text.encoder_2=none"]
    )
    (tmp_path / "all.yaml").write_text(commented_yaml())
    assert unused(load_config(tmp_path / "all.yaml")) == []


@pytest.mark.parametrize(
    ("old", "new"), [("sampling_steps", "sampling.steps"), ("guidance_scale", "sampling.guidance_scale")]
)
def test_a_key_of_an_earlier_version_is_refused_naming_the_new_one(load, old, new):
    for work in (
        lambda: load(f"evaluate: {{{old}: 3}}"),
        lambda: load("", f"evaluate.{old}=3"),
        lambda: commented_yaml([f"evaluate.{old}=3"]),
    ):
        with pytest.raises(EdgeDiTError, match=f"the key evaluate.{old} is called {new} now"):
            work()


def test_what_a_choice_makes_useless_is_said_not_refused(load):
    assert unused(load("latency: {table: a.json, repeats: 3, threads: 1}")) == [
        "latency.table makes latency.repeats of no use"
    ]
    assert unused(load("student: {genotype: EdgeDiT-1, max_flops_ratio: 0.5}\nsearch: {samples: 100}")) == [
        "student.genotype makes search.samples, student.max_flops_ratio of no use"
    ]
    assert unused(load("teacher: {path: a/b, steps: 3}")) == ["teacher.path makes teacher.steps of no use"]
    assert unused(load("text: {encoder: a/b, encoder_2: none, steps: 3}")) == [
        "text.encoder and text.encoder_2 makes text.steps of no use"
    ]
    assert unused(load("text: {encoder: a/b, steps: 3}")) == []


def test_a_menu_makes_the_papers_sizes_of_no_use(load):
    config = load("bank: {menu: [{mlp_ratio: 2}, {merge: 3, modulation_rank: 0}], both_steps: 3}")
    assert unused(config) == ["bank.menu makes bank.both_steps of no use"]
    assert config.section("bank")["bank"]["menu"] == [{"mlp_ratio": 2}, {"merge": 3, "modulation_rank": 0}]
