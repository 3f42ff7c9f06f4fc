"""Tables of records: figures as readers expect them, and a table for what every kind of record holds."""

import importlib

import pytest

from edgedit_hf.errors import EdgeDiTError


@pytest.fixture
def tables(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    return importlib.import_module("tables")


@pytest.mark.parametrize(
    "value, text",
    [
        *((0.0, "0"), (5.0, "5.00"), (0.5, "0.500"), (0.01234, "0.0123"), (0.00001234, "1.23e-05"), (None, "")),
        *((12.345, "12.3"), (100.2, "100"), (999.6, "1,000"), (1234.5, "1,234"), (-0.25, "-0.250")),
    ],
)
def test_numbers(tables, value, text):
    assert tables.number(value) == text


def test_a_table(tables):
    made = tables.table(["", "b"], [["x", "1"], ["", "2"]])
    assert made.splitlines() == ["| | b |", "| --- | --- |", "| x | 1 |", "| | 2 |"]


def test_every_kind_is_a_script_or_of_a_run(repository, tables):
    scripts = {path.stem for path in (repository / "benchmarks").glob("*.py")}
    assert set(tables.TABLES) <= scripts | {"run", "ranking"}


def test_a_run(tables):
    """Columns that no model has are left out; an extractor's distance is no FID."""
    model = {
        "name": "teacher",
        "parameters": 1868036,
        "flops": 40067328,
        "bytes": {"fp32": 7463952, "int8": 1865988},
        "latency_ms": {"onnxruntime-fp32": 8.776},
        "metrics": {"fid[digits-cnn,n=2000]": 5.5835, "recall": 0.59666},
        "steps": 10,
        "guidance_scale": 1.5,
        "class_agreement": 0.9985,
    }
    exported = {**model, "name": "onnx-int8", "bytes": {"int8": 1360164}, "latency_ms": {"onnxruntime-int8": 3.558}}
    losses = {"mlp": {"random": 1.2, "closed_form": 0.0014645, "after": 0.0010771}}
    searched = {"hypervolume": [1.0, 2.0, 3.0, 4.0], "random_hypervolume": [1.0, 1.5, 2.0, 2.5]}
    facts = {"bank": {"median_losses": losses}, "search": searched, "latency": {"batch_size": 32}}
    made = tables.run({"models": [model, exported], **facts})
    header, _, teacher, other = made["models"].splitlines()
    assert "Fréchet distance (digits-cnn, n=2,000)" in header and "FID" not in header and "precision" not in header
    assert teacher == "| teacher | 1.87 M | 40.1 | 7.46 MB | 10, 1.5 | 5.58 | 0.597 | 99.9 % |"
    assert other.startswith("| onnx-int8 | 1.87 M | 40.1 | 1.36 MB | 10, 1.5 |")
    assert made["latency of 32 images a forward"].splitlines() == [
        *("| | ONNX Runtime fp32, ms | ONNX Runtime int8, ms |", "| --- | --- | --- |"),
        *("| teacher | 8.78 | |", "| onnx-int8 | | 3.56 |"),
    ]
    assert "| mlp | 1.20 | 0.00146 | 0.00108 |" in made["proxies"]
    assert made["search"].splitlines()[-1] == "| 4 | 4.000 | 2.500 |"


def test_a_run_of_captions(tables):
    """What was judged on captions that training never saw, and the time an image, stand only where there are any."""
    model = {"name": "tiny", "parameters": 250000, "flops": 1e7, "bytes": {"fp32": 1e6}, "latency_ms": {}}
    model |= {"metrics": {}, "class_agreement": 0.999}
    held_out = {"held_out": {"class_agreement": 0.988}, "seconds_per_image": {"torch-fp32": 0.00214}}
    made = tables.run({"models": [model, {**model, "name": "full", **held_out}], "latency": {}})["models"].splitlines()
    assert made[0].split("|")[5:-1] == [
        *(" an image, PyTorch fp32 ", " shows the class asked for ", " the same, of captions kept out of training ")
    ]
    assert made[2].endswith("| 1.00 MB | | 99.9 % | |") and made[3].endswith("| 1.00 MB | 2.14 ms | 99.9 % | 98.8 % |")


def test_a_distance_of_a_run_stands_with_its_standard_error(tables):
    model = {"name": "teacher", "parameters": 1, "flops": 1, "bytes": {"fp32": 4}, "latency_ms": {}}
    model |= {"metrics": {"fid[x,n=9]": 5.0}, "standard_errors": {"fid[x,n=9]": 0.123}}
    old = {**model, "name": "student", "standard_errors": {}}
    header, _, first, second = tables.run({"models": [model, old], "latency": {}})["models"].splitlines()
    assert header.endswith("| Fréchet distance (x, n=9), ± standard error |")
    assert first.endswith("| 5.00 ± 0.12 |") and second.endswith("| 5.00 |")


def test_what_was_not_judged_alike_does_not_stand_in_one_column(tables):
    model = {"name": "teacher", "parameters": 1, "flops": 1, "bytes": {"fp32": 4}, "latency_ms": {}, "metrics": {}}
    stamp = {"extractor": "inception", "extractor_hash": "a", "reference": "b", "count": 10, "rounding": "bytes"}
    other = {**model, "name": "student", "stamp": {**stamp, "reference": "c"}}
    with pytest.raises(EdgeDiTError, match="teacher and student were not judged alike: reference is 'b'"):
        tables.run({"models": [{**model, "stamp": stamp}, other], "latency": {}})


def test_few_steps_of_every_width(tables):
    model = {"name": "tiny", "parameters": 250000, "flops": 1e7, "bytes": {"fp32": 1e6}, "latency_ms": {}}
    model |= {"metrics": {"fid[x,n=9]": 5.0}, "steps": 20, "guidance_scale": 2.5}
    few = {**model, "name": "tiny-few-steps", "solver": "UniPC", "steps": 4, "seconds_per_image": {"torch-fp32": 0.007}}
    ours = {**few, "solver": None, "guidance_scale": 1.0, "metrics": {"fid[x,n=9]": 4.5}}
    widths = [{"name": "tiny", "many": model, "few": few, "few_step": ours}]
    made = tables.run({"models": [model], "few_step": {"widths": widths}, "latency": {}})["few steps"].splitlines()
    assert [line.split("|")[1].strip() for line in made[2:]] == ["tiny", "tiny, UniPC", "tiny, distilled"]
    assert made[4].endswith("| 1.00 MB | 4, 1 | 7.00 ms | 4.50 |")


def test_what_choices_save(tables):
    """A column a runtime; what was not timed there is left empty."""
    rows = [
        {"kind": "onnxruntime-fp32", "choice": "mlp2", "saved_share": 0.304, "noisy": False},
        {"kind": "onnxruntime-int8", "choice": "mlp2", "saved_share": 0.25, "noisy": True},
        {"kind": "onnxruntime-fp32", "choice": "tokens2", "saved_share": 0.69, "noisy": False},
    ]
    made = tables.latency_table({"preset": "DiT-XL/2", "layers": 28, "batch": 1, "rows": rows})[""].splitlines()
    assert made[0] == "| a layer of DiT-XL/2 is shortened by | ONNX Runtime fp32 | ONNX Runtime int8 |"
    assert made[2:] == ["| `mlp2` | 30 % | 25 %, noisy |", "| `tokens2` | 69 % | |"]


def test_one_image_end_to_end(tables):
    """Multiplied seconds are marked."""
    row = {"network": "DiT-XL/2", "steps": 50, "timed_steps": 5, "forwards": 100, "seconds": 164.3, "ratio": 1.0}
    row |= {"row": "diffusers-fp32", "peak_bytes": 3.784e9, "memory_ratio": 1.0}
    row |= {"whole_seconds": {"AutoencoderKL": 168.2, "AutoencoderTiny": 164.6}}
    decoder = {"decoder": "AutoencoderTiny", "runtime": "torch", "seconds": 0.1734, "parameters": 1.2e6}
    made = tables.end_to_end({"rows": [row], "decoders": [decoder]})
    assert made["denoising"].splitlines()[2] == (
        "| `diffusers-fp32` | DiT-XL/2 | 50* | 100 | 164 | 1.00 | 3,784 MB | 1.0 | 168 s | 165 s |"
    )
    assert made["decoding"].splitlines()[2] == "| AutoencoderTiny | PyTorch | 0.173 | 1.2 M |"


def test_metrics(tables):
    row = {"name": "kernel distance", "ours": 0.0123456, "adm": None, "torchmetrics": 0.01234561, "apart": 8.1e-7}
    made = tables.metrics({"count": 1300, "features": 1280, "rows": [row]})[""].splitlines()
    assert made[0].startswith("| 1,300 images against 1,300, 1,280 features | ours |")
    assert made[2] == "| kernel distance | 0.0123456 | | 0.0123456 | 8e-07 |"


def test_an_elastic_network(tables):
    of_each = {"tiny": 0.5, "full": 0.25}
    result = {
        "steps": 1500,
        "steps_in_supernet": {"tiny": 740, "full": 1500},
        "parameters": {"tiny": 250_000, "full": 1_590_000},
        **{key: of_each for key in ("loss_supernet", "loss_alone")},
        "loss_ratio": {"tiny": 1.0049, "full": 0.99},
        "forward_ratio": {"tiny": 1.014, "full": 1.0},
        "seconds_supernet": 160.0,
        "seconds_alone": {"tiny": 80.0, "full": 120.0},
        "time_ratio": 0.8,
        "switch_ms": 0.0054,
    }
    made = tables.elastic(result)
    assert made["losses"].splitlines()[2] == "| tiny | 0.25 M | 740 | 1,500 | 0.500 | 0.500 | 1.005 | 1.01 |"
    assert made["costs"].splitlines()[2:] == [
        *("| training the supernet | 160 s |", "| training the three alone | 200 s |"),
        *("| ratio | 0.80 |", "| a switch | 5.4 µs |"),
    ]


def test_a_push(tables):
    row = {"seconds": 6.37, "sent": 889_006_512, "memory": 158_921_000.0}
    made = tables.push({"bytes": 889_003_874, "rows": {"edgedit push": row}, "ratio": 2.4})[""].splitlines()
    assert made[0].startswith("| 889 MB on the loopback |")
    assert made[2] == "| `edgedit push` | 6.4 s | 889 MB | 159 MB |"


def test_evidence(tables):
    """A column a seed, with nothing where it has no value; ablations that not every run has are left out."""

    def of_seed(seed, value, distance, **ablations):
        return {
            "seed": seed,
            "distances": {"teacher": 3.5, "quantized": distance},
            "claims": {"won back": {"value": value, "interval": [0.8, 1.1] if value else []}},
            "costs": {"flops": 0.61, "onnxruntime-fp32": 0.684},
            "ablations": {"starts": {"closed_form": {"before": 0.02, "after": 0.01, "distance": 4.125}}, **ablations},
        }

    def student(name, distance):
        return {"score": 0.5, "latency_ratio": 0.334, "distance": distance, "hash": name}

    of_one = {
        "objectives": {"proxy_loss": {"spearman": [0.5, -0.25, 1.0], "partial": [None, None, None]}},
        "merges": {
            "0.55": {"with": student("a", 5.0), "without": student("a", 5.0)},
            "0.34": {"with": student("b", 6.0), "without": student("c", 6.0)},
            "0.27": {"with": student("d", 7.0)},
        },
        "terms": {
            "both": {"distance": 4.0, "recall": 0.75, "won_back": 0.951},
            "knowledge": {"distance": 4.5, "recall": 0.5, "won_back": None},
            "matching": {"distance": 99.0, "recall": 0.0, "won_back": -9.5},
        },
    }
    runs = [of_seed(0, 0.9, 3.625, **of_one), of_seed(1, None, None)]
    about = {
        "extractor": "fashion_mnist-cnn",
        "samples": 2000,
        "claims": {"won back": {"paper": "DPG .97", "bar": "≥ 0.8", "mean": 0.9, "kept": True}},
        "papers_costs": {"flops": ".61, .72", "onnxruntime-fp32": ".60 (iPhone)"},
    }
    made = tables.evidence({**about, "runs": runs})
    assert list(made) == ["claims", "costs", "distances", "starts"]
    assert made["claims"].splitlines()[2:] == ["| won back | DPG .97 | ≥ 0.8 | 0.900 (0.800 – 1.100) | | 0.900 |"]
    assert made["costs"].splitlines()[2:] == [
        *("| FLOPs | .61, .72 | 0.61 | 0.61 |", "| latency, ONNX Runtime fp32 | .60 (iPhone) | 0.68 | 0.68 |")
    ]
    timed = [{**run, "seconds": {"teacher": 600.4, "tune": 90.2}} for run in runs]
    assert tables.evidence({**about, "runs": timed})["seconds"].splitlines()[2:] == [
        *("| teacher | 600 | 600 |", "| tune | 90.2 | 90.2 |", "| all | 691 | 691 |")
    ]
    stamp = {"extractor": "inception", "extractor_hash": "a", "reference": "b", "count": 10, "rounding": "bytes"}
    apart = [{**runs[0], "stamps": {"teacher": stamp, "quantized": {**stamp, "count": 20}}}]
    with pytest.raises(EdgeDiTError, match="count"):
        tables.evidence({**about, "runs": apart})
    header, _, teacher, quantized = made["distances"].splitlines()
    assert "Fréchet distance (fashion_mnist-cnn, n=2,000)" in header
    assert (teacher, quantized) == ("| teacher | 3.50 | 3.50 |", "| student, quantized | 3.62 | |")
    assert made["starts"].splitlines()[2] == "| 0 | closed form | 0.0200 | 0.0100 | 4.12 |"
    one = {name: table.splitlines()[2:] for name, table in tables.evidence({**about, "runs": [runs[0]]}).items()}
    assert one["objectives"] == ["| 0 | summed proxy loss | 0.50 [−0.25, 1.00] | – |"]
    assert one["merges"] == [
        "| 0 | 0.55 of the teacher's | merges of two, with or without those of three | 0.500 | 0.33 | 5.00 |",
        "| 0 | 0.34 of the teacher's | merges of two and of three | 0.500 | 0.33 | 6.00 |",
        "| 0 | 0.34 of the teacher's | merges of two | 0.500 | 0.33 | 6.00 |",
        "| 0 | 0.27 of the teacher's | merges of two and of three | 0.500 | 0.33 | 7.00 |",
    ]
    assert one["terms"] == [
        "| 0 | both | 4.00 | 0.750 | 95 % |",
        "| 0 | knowledge alone | 4.50 | 0.500 | |",
        "| 0 | matching alone | 99.0 | 0 | nothing |",
    ]


def test_a_browser_in_the_loop(tables):
    """The student's time as predicted and as measured; a picture that is Python's to the byte has no dB."""
    second = {"networks": 17, "mean_error": 0.05, "kendall": 0.95, "student_predicted_ms": 44.0}
    second |= {"student_measured_ms": 40.0, "teacher_measured_ms": 80.0, "speedup": 2.0}
    pairs = [{"pair": ["browser", "executorch"], "kendall": 0.9}, {"pair": ["executorch", "FLOPs"], "kendall": 0.5}]
    devices = [{"name": "browser", "teacher_ms": 78.0}, {"name": "executorch", "teacher_ms": 26.0}]
    made = tables.browser_loop(
        {
            "batch": 48,
            "first": {"mean": 0.018},
            "second": second,
            "devices": {"space": {"pairs": pairs}, "devices": devices},
            "speedups": {"browser": 1.9, "executorch": 1.6},
            "pages": {
                "teacher": {"times": {"a step": "9 ms"}, "db": None},
                "student": {"times": {"a step": "5 ms"}, "db": 51.2},
            },
        }
    )
    assert "| the student, predicted | 44.0 ms |" in made["predictions"] and "| 2.00 |" in made["predictions"]
    assert made["devices"].splitlines()[2:] == [
        "| browser | 78.0 ms | 1.90 | |",
        "| executorch | 26.0 ms | 1.60 | 0.90 |",
    ]
    assert made["pages"].splitlines()[2:] == ["| teacher | 9 ms | equal |", "| student | 5 ms | 51.2 dB |"]
