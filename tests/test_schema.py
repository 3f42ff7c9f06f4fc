"""Whatever others wrote into a file of ours ends in one clear error: every kind of file × every kind of damage; and the
schemas by themselves.
"""

import contextlib
import dataclasses
import json
import time
import typing

import pytest
import torch
from demo_stage import demo_run
from run_folder import make_run
from safetensors.torch import save_file

from edgedit_hf import records
from edgedit_hf.commands.info import describe
from edgedit_hf.data.latents import open_latents
from edgedit_hf.data.text_table import TextTable
from edgedit_hf.distill.proxy_bank import ProxyBank
from edgedit_hf.distill.teacher import read_genotype
from edgedit_hf.elastic.supernet import new_elastic
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.files import hash_json
from edgedit_hf.genotype import Genotype
from edgedit_hf.metrics.extractors import FeatureExtractor, ImageDataset, train_classifier
from edgedit_hf.quantization.activations import ActivationScales
from edgedit_hf.report import plots
from edgedit_hf.report.edgedit import build_report
from edgedit_hf.report.elastic import build_elastic_report, draw_elastic_figures, headlines
from edgedit_hf.run.checkpoint import load_state, save_state
from edgedit_hf.run.config import RunConfig
from edgedit_hf.schema import check, convert, fill, key, read_lines, read_record, shorten
from edgedit_hf.search.ask_tell import RandomSearch
from edgedit_hf.search.bayes import BayesSearch
from edgedit_hf.search.latency_table import LatencyTable
from edgedit_hf.search.pareto import choose
from edgedit_hf.search_space import SearchSpace

HUGE, FOREIGN = 10**9, object()
NO_JSON = [
    "",
    "{",
    "\x00\x01",
    '{"a": NaN}',
    '{"a": 1e999',
    "[" * 100_000,
    "9" * 5000,
    "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
]


# -------------------------------------------------------------------- what is read, and how


@dataclasses.dataclass
class File:
    """A kind of file: where it lies, and what reads it."""

    path: typing.Any
    read: typing.Callable[[], typing.Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_transformer):
    """A folder with one file of every kind, and how each is read."""
    root = tmp_path_factory.mktemp("world")
    teacher = make_transformer(num_layers=4)
    run = make_run(root / "run", teacher)

    def write(path, value):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        return path

    report = lambda: build_report(run)  # noqa: E731
    space = SearchSpace.for_config(teacher.config, reduced_attention_dim=8)
    (run / "exported" / "onnx-fp32").mkdir(parents=True, exist_ok=True)
    write(run / "exported" / "onnx-fp32" / "verify.json", {"relative_error": 0.1, "tolerance": 0.2, "psnr_db": 40.0})
    write(run / "exported" / "onnx-fp32" / "bench.json", {"initializer_bytes": 100, "initializer_shrink": 2.0})
    write(run / "evaluate" / "curves.json", {"student": {"steps": [1, 2], "values": [3.0, 2.0]}})

    table = {
        **{
            "format": 1,
            "runtime": "onnxruntime",
            "precision": "fp32",
            "batch": 1,
            "threads": 1,
            "space": space.to_dict(),
            "trunk_ms": 1.0,
        },
        "trunk": {
            name: teacher.config[name]
            for name in ("sample_size", "patch_size", "in_channels", "hidden_size", "num_classes", "learn_sigma")
        },
        "blocks": [
            dict(zip(("attention_dim", "num_heads", "mlp_ratio", "ms"), (*space.option_shape(o)[:3], 1.0)))
            for o in ("original", "both")
        ],
        "environment": {"cpu": "x"},
    }
    write(root / "table.json", {**table, "hash": hash_json(table)})

    def read_table() -> None:
        """As a hand that also mends the hash."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            values = json.loads((root / "table.json").read_text())
            if isinstance(values, dict):
                values.pop("hash", None)
                write(root / "table.json", {**values, "hash": hash_json(values)})
        LatencyTable.from_json(root / "table.json").latency_ms(space.from_code((0, 0)))

    pixels = torch.randint(0, 255, (40, 1, 8, 8), dtype=torch.uint8).numpy()
    images = ImageDataset(pixels, [i % 2 for i in range(40)], ["a", "b"])
    train_classifier(images, steps=2).save(root / "extractor")
    write(
        root / "latents" / "index.json",
        {
            "format": 1,
            "dataset": "d",
            "vae": "v",
            "count": 3,
            "shape": [4, 2, 2],
            "shard_rows": 2,
            "label_names": ["a"],
        },
    )
    for shard, rows in enumerate((2, 1)):
        (root / "latents" / f"shard-{shard:05d}").mkdir()
        content = {"latents": torch.zeros(rows, 4, 2, 2), "labels": torch.zeros(rows, dtype=torch.int64)}
        save_file(content, root / "latents" / f"shard-{shard:05d}" / "latents.safetensors")
    captions = ["a", "b"]
    write(
        root / "texts" / "index.json", {"format": 1, "captions": hash_json(captions), "encoders": "e", "dims": [3, 0]}
    )
    (root / "texts" / "shard-00000").mkdir()
    save_file(
        {"tokens_0": torch.zeros(4, 3), "ends_0": torch.tensor([0, 1, 4])},
        root / "texts" / "shard-00000" / "text.safetensors",
    )
    ActivationScales([500.0], {"a": torch.tensor([0.1, 0.2])}, {"a": torch.tensor([0, 1])}).save(root / "scales.json")
    write(
        root / "elastic.json",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 1,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_key_value_heads": 2,
            "num_layers": [1, 1, 1],
            "mlp_ratios": [2.0, 2.0, 2.0],
            "text_dims": [4, 4],
            "text_width": 8,
            "num_text_key_value_heads": 2,
            "attention_blocks": 4,
            "subnets": {"small": 0.5, "full": 1.0},
        },
    )

    def read_front() -> None:
        """As `search.selection.select`, short of loading the teacher."""
        front = read_record(run / "search" / "front.json", records.Front, "stage search")
        bound = 0.9 * front["teacher"]["parameters"] * 1e9
        space.from_code(
            choose(
                front["front"],
                max_latency_ms=1e9 * front["teacher"]["latency_ms"],
                max_parameters=bound if "parameters" in front["front"][0] else None,
            )[0]["code"]
        )

    def read_elastic() -> None:
        config = RunConfig()
        config.elastic.model = str(root / "elastic.json")
        with torch.device("meta"):  # allocating what is allowed would take the test's time
            new_elastic(config, [(1, 8, 8)], [4, 4])

    write(root / "model" / "config.json", {"_class_name": "EdgeDiTTransformer2DModel", **teacher.config})
    (root / "genotype.json").write_text(space.from_code((5, 16)).to_json())
    search = RandomSearch(space, 4, num_initial=2)
    for genotype in search.ask(2):
        search.tell(genotype, (1.0, 2.0))
    search.ask(1)
    search.save(root / "state.json")
    save_state(root, {"step": 3, "objects": [torch.ones(2), ("a", None), {1: 2.0}]}, "kept")
    trained = {
        "config": {},
        "seed": 0,
        "steps": 4,
        "seconds": 1.0,
        "versions": {"torch": "2"},
        "sampled": {"small": 2},
        "validation": {"small": 0.5},
    }
    other = root / "t2i"
    write(other / "elastic" / "stage.json", trained)
    (other / "elastic" / "telemetry.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss_small": 1.0}) + "\n" for step in (1, 2))
    )
    write(other / "text" / "stage.json", {**trained, "learned": {"x": 1.0}})
    write(other / "evaluate" / "stage.json", {**trained, "config": {"subnets": ["small", "full"]}})
    for name in ("small", "full"):
        judged = {
            "name": name,
            "stage": "subnet",
            "parameters": 3,
            "flops": 4,
            "latency_ms": {"torch-fp32": 1.0},
            "metrics": {"fid[a,n=8]": 1.0, "validation_loss": None},
        }
        shares = {
            "class_agreement": 0.5,
            "style_agreement": {"stroke": 0.4},
            "held_out": {"class_agreement": 0.1, "num_samples": 2},
        }
        write(
            other / "evaluate" / f"{name}.json",
            {**judged, "num_samples": 8, "steps": 2, "guidance_scale": 1.0, **shares},
        )
        save_file({"captions": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, other / "evaluate" / f"{name}.safetensors")
    write(
        other / "evaluate" / "reference.json",
        {"extractor": "a", "real_floor": 0.1, "extractor_accuracy": 0.9, "classifier": "b", "classifier_accuracy": 0.9},
    )
    measured = {"small": {"torch-fp32": 1.0}, "full": {"torch-fp32": 2.0}}
    write(
        other / "evaluate" / "latency.json",
        {"latency_ms": measured, "batch_size": 1, "threads": 1, "environment": {"cpu": "x"}},
    )
    write(other / "evaluate" / "captions.json", {"captions": ["a one", "a two"], "shown": 2})

    def other_report() -> None:
        headlines(build_elastic_report(other))
        with pytest.MonkeyPatch.context() as patch:  # its pictures cost a second each
            for draw in ("caption_grid", "curve_plot"):
                patch.setattr(plots, draw, lambda *arguments, **options: None)
            draw_elastic_figures(other, build_elastic_report(other))

    write(
        root / "quantization.json",
        {"average_bits": 4.3, "error": {"untuned": {"full": {"sqnr_db": 20.0}, "small": {"sqnr_db": None}}}},
    )
    return {
        "elastic stage": File(other / "elastic" / "stage.json", other_report),
        "elastic evaluation": File(other / "evaluate" / "stage.json", other_report),
        "width": File(other / "evaluate" / "small.json", other_report),
        "elastic reference": File(other / "evaluate" / "reference.json", other_report),
        "elastic latency": File(other / "evaluate" / "latency.json", other_report),
        "captions": File(other / "evaluate" / "captions.json", other_report),
        "telemetry": File(other / "elastic" / "telemetry.jsonl", other_report),
        "quantization": File(
            root / "quantization.json",
            lambda: read_record(root / "quantization.json", records.Quantization, "stage quantize"),
        ),
        "front": File(run / "search" / "front.json", read_front),
        "front in the report": File(run / "search" / "front.json", report),
        "bank": File(
            run / "bank" / "index.json",
            lambda: [ProxyBank(run / "bank", teacher).load(layer) for layer in space.proxies()[:2]],
        ),
        "bank in the report": File(run / "bank" / "index.json", report),
        "choice": File(run / "student" / "choice.json", report),
        "search state": File(
            run / "search" / "state.json", lambda: BayesSearch(space, 10, 5, 8).resume(run / "search" / "state.json")
        ),
        "search state in the report": File(run / "search" / "state.json", report),
        "random state": File(
            root / "state.json", lambda: RandomSearch(space, 4, num_initial=2).resume(root / "state.json")
        ),
        "stage": File(run / "teacher" / "stage.json", report),
        "model": File(run / "evaluate" / "student-tuned.json", report),
        "reference": File(run / "evaluate" / "reference.json", report),
        "latency": File(run / "evaluate" / "latency.json", report),
        "curves": File(run / "evaluate" / "curves.json", report),
        "verify": File(run / "exported" / "onnx-fp32" / "verify.json", report),
        "bench": File(run / "exported" / "onnx-fp32" / "bench.json", report),
        "table": File(root / "table.json", read_table),
        "extractor": File(root / "extractor" / "extractor.json", lambda: FeatureExtractor.load(root / "extractor")),
        "latents": File(root / "latents" / "index.json", lambda: open_latents(root / "latents").batch([0, 2])),
        "texts": File(root / "texts" / "index.json", lambda: TextTable(root / "texts", captions).batch([0, 1])),
        "scales": File(root / "scales.json", lambda: ActivationScales.load(root / "scales.json")),
        "elastic model": File(root / "elastic.json", read_elastic),
        "model config": File(root / "model" / "config.json", lambda: describe(str(root / "model"))),
        "genotype": File(
            root / "genotype.json", lambda: read_genotype(str(root / "genotype.json"), "student.genotype")
        ),
        "checkpoint": File(root / "kept.json", lambda: load_state(root, "kept")),
    }


NAMES = [
    *(
        "front",
        "front in the report",
        "bank",
        "bank in the report",
        "choice",
        "search state",
        "search state in the report",
        "random state",
        "stage",
    ),
    *(
        "model",
        "reference",
        "latency",
        "curves",
        "verify",
        "bench",
        "table",
        "extractor",
        "latents",
        "texts",
        "scales",
        "elastic model",
        "model config",
    ),
    *(
        "genotype",
        "checkpoint",
        "elastic stage",
        "elastic evaluation",
        "width",
        "elastic reference",
        "elastic latency",
        "captions",
        "telemetry",
        "quantization",
    ),
]


def places(value, path=()):
    """Paths of the values in nested plain values; of lists the first entries alone."""
    yield path
    entries = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    alike = len(entries) > 1 and all(isinstance(inner, dict) for _, inner in entries)
    for name, inner in entries[:1] if alike or isinstance(value, list) else entries:
        yield from places(inner, (*path, name))


def changed(value, path, new):
    """A copy with another value there (FOREIGN: without it)."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is FOREIGN:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("most", [6, pytest.param(10**6, marks=pytest.mark.slow, id="everywhere")])
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_one_error_or_none(world, name, most):
    """At so many spots of the file, spread over it."""
    file = world[name]
    good = file.path.read_text()
    file.read()
    values = json.loads(good.splitlines()[0] if name == "telemetry" else good)
    refused = taken = 0
    try:
        cases = [(text, None) for text in (*NO_JSON, good[: len(good) // 2], "[]", "{}", "3", '"x"', "null")]
        spots = sorted(
            {tuple("*" if isinstance(part, int) else part for part in path): path for path in places(values)}.values(),
            key=str,
        )
        spots = [path for path in spots if path]
        spots = spots[:: -(-len(spots) // most)]
        for path in spots:
            for new in (FOREIGN, None, "x", True, -1, 0, HUGE, 10**400, 1e300, [], {}, [HUGE], "../x", "y" * 10_000):
                cases.append((json.dumps(changed(values, path, new)), (path, new)))
        for text, what in cases:
            file.path.write_text(text, encoding="utf-8")
            started = time.process_time()
            try:
                file.read()
                taken += 1
                empty = {
                    "telemetry": text in good or "\n" not in text,
                    "curves": text == "{}",
                }  # lines that a kill cut off, no curve
                assert what is not None or empty.get(name), text[:50]
            except EdgeDiTError as error:
                refused += 1
                assert len(str(error)) < 2500, (what, len(str(error)))
            assert time.process_time() - started < 3, what
        file.path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(EdgeDiTError):
            file.read()
        file.path.unlink()
        if name not in (
            "search state",
            "random state",
            "stage",
            "model",
            "reference",
            "latency",
            "curves",
            "verify",
            "bench",
        ):
            with pytest.raises(EdgeDiTError):
                file.read()
    finally:
        file.path.write_text(good)
    assert refused > taken / 3, (refused, taken)


# -------------------------------------------------------------------- the schemas by themselves


@dataclasses.dataclass(kw_only=True)
class Inner:
    ms: float = key(above=0.0, maximum=10.0)


@dataclasses.dataclass(kw_only=True)
class Outer:
    name: str = key(length=(1, 5))
    count: int = key(3, "how many", minimum=1, maximum=9)
    kind: str = key("a", "", ("a", "b"))
    parts: list[Inner] = key(list, items=2)
    table: dict[str, float | None] = key(dict, minimum=0.0)
    any: typing.Any = key(None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], r"it is \[\] \(list\); it must hold keys and values"),
        ({}, "name is missing beside"),
        ({"name": 3}, r"name is 3 \(int\); it must be str"),
        ({"name": "x" * 6}, "name is 'xxxxxx', 6 characters; it may have at most 5"),
        ({"name": "a\nb"}, r"name is 'a\\nb'; it holds the character '\\n'"),
        ({"name": "a", "count": True}, r"count is True \(bool\); it must be int"),
        ({"name": "a", "count": 10}, "count is 10; it must be at most 9"),
        ({"name": "a", "count": 10**400}, "count is a number of 1329 bits; it must be at most 9"),
        ({"name": "a", "kind": "c"}, "kind is 'c'; it must be one of a, b"),
        ({"name": "a", "parts": [{}]}, r"parts\[0\].ms is missing"),
        ({"name": "a", "parts": [{"ms": 1}] * 3}, "parts has 3 entries; it must have at most 2"),
        ({"name": "a", "parts": [{"ms": 1}, {"ms": 0}]}, r"parts\[1\].ms is 0.0; it must be above 0.0"),
        ({"name": "a", "parts": [{"ms": float("nan")}]}, r"parts\[0\].ms is nan; it must be a finite number"),
        ({"name": "a", "parts": [3]}, r"parts\[0\] is 3 \(int\); it must be keys and values"),
        ({"name": "a", "table": {"x": -1}}, "table.x is -1.0; it must be at least 0.0"),
        ({"name": "a", "table": {"x": "1"}}, r"table.x is '1' \(str\); it must be float or null"),
    ],
)
def test_a_schema_names_key_value_and_bound(values, said):
    with pytest.raises(EdgeDiTError, match=said):
        check(values, Outer)


def test_what_fits_is_taken_as_it_stands(tmp_path):
    values = {"name": "a", "parts": [{"ms": 1}], "table": {"x": None, "y": 2}, "any": [[{}]], "newer": object}
    check(values, Outer)
    values.pop("newer")
    (tmp_path / "a.json").write_text(json.dumps({**values, "newer": [1]}))
    assert read_record(tmp_path / "a.json", Outer, "stage a") == {**values, "newer": [1]}
    with pytest.raises(
        EdgeDiTError, match="a.json does not describe a b: ms is missing .*stage a writes it, run that stage again"
    ):
        read_record(tmp_path / "a.json", Inner, "stage a", "a b")
    outer = Outer(name="b")
    assert fill(outer, {"count": 4, "table": {"x": 1}}, "here") == ["count", "table"] and (
        outer.count,
        outer.table,
    ) == (4, {"x": 1.0})
    assert convert("1e-3", float, "x", text_numbers=True) == 1e-3
    with pytest.raises(EdgeDiTError, match="must be float"):
        convert("1e-3", float, "x")


def test_lines_are_read_up_to_a_cut(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1, "x": NaN}\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_lines(path, records.Telemetry, "a stage")] == [1, 2]
    for text, said in (
        ('{"step": 1}\n3\n', "Line 2 of .* does not describe"),
        ('{"step"\n{"step": 1}\n', "Line 1 of .* is not JSON"),
        ('{"step": -1}\n', "Line 1"),
    ):
        path.write_text(text)
        with pytest.raises(EdgeDiTError, match=said):
            read_lines(path, records.Telemetry, "a stage")


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, list(range(10**6)), {str(i): i for i in range(10**5)}, 10**9999, [[[[[[[]]]]]]]],
    ids=lambda value: type(value).__name__,
)
def test_quoted_values_are_short(value):
    assert len(shorten(value)) < 300


def test_telemetry_that_is_damaged_does_not_stop_a_resumed_stage(tmp_path):
    state = demo_run(tmp_path, "a", {}, 3, log_every=1)
    for step in state.steps():
        state.log(loss=step)
    with open(tmp_path / "telemetry.jsonl", "a") as file:
        file.write('3\n{"stage": "a"}\n{"step": "x"}\n[]\n{"st')
    demo_run(tmp_path, "a", {}, 3, log_every=1).continue_at(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "telemetry.jsonl").read_text().splitlines()] == [1, 2]


def test_reading_a_whole_bank_costs_no_time():
    proxy = {
        "option": "mlp",
        "source": [1],
        "loss_before": 1.0,
        "loss_after": 0.5,
        "losses": {"after": 0.5},
        "curve": [[0, 1.0]] * 4,
    }
    space = SearchSpace(28, 1152, 16).to_dict()
    index = {"teacher_hash": "x", "space": space, "entries": {str(i): proxy for i in range(140)}}
    started = time.process_time()
    for _ in range(10):
        check(index, records.BankFigures)
    assert time.process_time() - started < 1


def test_genotypes_and_spaces_of_any_size_are_refused_before_they_are_built():
    layer = {"source": [0], "attention_dim": 10**9, "num_heads": 1, "mlp_ratio": 2.0}
    for change, said in (
        ({}, "attention_dim 1000000000"),
        ({"attention_dim": 8, "mlp_ratio": 1e9}, "mlp_ratio 1000000000.0"),
    ):
        with pytest.raises(EdgeDiTError, match=said):
            Genotype.from_layers([{**layer, **change}], 32)
    with pytest.raises(EdgeDiTError, match="hidden_size is 1000000000"):
        Genotype.from_layers([{**layer, "attention_dim": 8}], 10**9)
    with pytest.raises(EdgeDiTError, match="num_layers is 1000000000"):
        SearchSpace(10**9, 32, 2)
