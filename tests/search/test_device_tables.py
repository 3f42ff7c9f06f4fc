"""Tables of several devices: one objective, exact in the programme, against all genotypes of a small space."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.genotype import Genotype
from edgedit_hf.run.sections import LatencyConfig
from edgedit_hf.search.bayes import BayesSearch
from edgedit_hf.search.blocks import programme_of
from edgedit_hf.search.device_tables import DeviceTables, files_hash, given_files, given_tables, load_table, table_names
from edgedit_hf.search.encoding import Encoding
from edgedit_hf.search.exact import ExactChoice
from edgedit_hf.search.latency_table import LatencyTable
from edgedit_hf.search.programme import SLACK
from edgedit_hf.search.selection import select

PROTOCOL = {"imported": True, "bundle": "ab", "backend": "cpu", "cold_loads": 3, "warmups": 3, "rounds": 20, "drift": 0}


def of_device(table: LatencyTable, name: str, times, trunk_ms: float, **changes) -> LatencyTable:
    """A table of other times, as a phone's import gives it."""
    data = table.to_dict()
    blocks = [{**block, "ms": ms} for block, ms in zip(data["blocks"], times, strict=True)]
    environment = {"cpu": name, "machine": None, "versions": {"onnxruntime": "1.20"}}
    return LatencyTable(
        {**data, "blocks": blocks, "trunk_ms": trunk_ms, "environment": environment, "protocol": PROTOCOL, **changes}
    )


@pytest.fixture
def run(unsearched):
    return unsearched[0]


@pytest.fixture
def bank(unsearched):
    return unsearched[1]


@pytest.fixture
def tables(run):
    """Two phones that disagree: narrow attention is dear on one, a narrow MLP on the other."""
    own = LatencyTable.from_json(run / "latency" / "table.json")
    names = [block["option"] for block in own.to_dict()["blocks"]]
    one = {"original": 10.0, "mlp": 5.0, "attention": 9.5, "both": 4.5}
    two = {"original": 50.0, "mlp": 48.0, "attention": 27.0, "both": 25.0}
    return [
        of_device(own, "Galaxy", [one[name] for name in names], 3.0),
        of_device(own, "iPhone", [two[name] for name in names], 1.0),
    ]


def ratios(tables, genotype) -> list[float]:
    """By the definition, without the class."""
    whole = Genotype.original(genotype.num_teacher_layers, genotype.hidden_size, genotype.layers[0].num_heads)
    found = []
    for table in tables:
        ms = {shape: value for shape, value in table.blocks.items()}
        of = [table.trunk_ms + sum(ms[layer.shape.timed] for layer in each.layers) for each in (genotype, whole)]
        found.append(of[0] / of[1])
    return found


def everything(bank, programme):
    """(genotype, score) of the whole space."""
    return [(genotype, programme.of(genotype).score) for genotype in bank.space.all()]


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_the_objective_by_its_definition(tables, bank, weights):
    both = DeviceTables(tables, weights)
    whole = Genotype.of(bank.teacher.config)
    unit = tables[0].latency_ms(whole)
    assert both.latency_ms(whole) == pytest.approx(unit)
    for genotype in itertools.islice(bank.space.all(), 0, None, 37):
        first, second = ratios(tables, genotype)
        wanted = max(first, second) if weights is None else (1 * first + 3 * second) / 4
        assert both.latency_ms(genotype) == pytest.approx(unit * wanted)
        assert both.latencies_ms(genotype) == {
            "Galaxy": pytest.approx(tables[0].latency_ms(genotype)),
            "iPhone": pytest.approx(tables[1].latency_ms(genotype)),
        }


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_the_programme_is_exact_for_it(tables, bank, weights):
    """Optima, fastest students and infeasible budgets are those of trying every genotype."""
    both = DeviceTables(tables, weights)
    programme = programme_of(bank, both)
    whole = everything(bank, programme)
    latency = {genotype.hash: both.latency_ms(genotype) for genotype, _ in whole}
    for genotype, _ in whole[::41]:
        assert programme.of(genotype).costs["latency_ms"] == pytest.approx(latency[genotype.hash])
    fastest = programme.least("latency_ms")
    assert fastest.gap == 0 and fastest.costs["latency_ms"] == pytest.approx(min(latency.values()))
    full = latency[Genotype.of(bank.teacher.config).hash]
    for share in (0.6, 0.7, 0.85, 1.0):
        best = min(score for genotype, score in whole if latency[genotype.hash] <= share * full * (1 + SLACK))
        found = programme.best({"latency_ms": share * full})
        assert found.gap == 0 and found.score == pytest.approx(best)
        assert latency[found.genotype.hash] <= share * full * (1 + 1e-6)
    most = 0.7 * programme.of(Genotype.of(bank.teacher.config)).costs["parameters"]
    small = [latency[genotype.hash] for genotype, _ in whole if programme.of(genotype).costs["parameters"] <= most]
    assert programme.least("latency_ms", {"parameters": most}).costs["latency_ms"] == pytest.approx(min(small))
    with pytest.raises(EdgeDiTError, match=r"No student has latency_ms <= .*, but the least is"):
        programme.best({"latency_ms": 0.9 * min(latency.values())})
    front = programme.front(9)
    for point in front:  # no genotype is better in both
        within = [score for genotype, score in whole if latency[genotype.hash] <= point.costs["latency_ms"]]
        assert point.score <= min(within) + 1e-9


def test_each_device_pulls(tables, bank):
    """The worst ratio is another student's than either device's own optimum: the test space tells them apart."""
    both = programme_of(bank, DeviceTables(tables))
    worst = both.least("latency_ms").costs["latency_ms"]
    alone = [programme_of(bank, table).least("latency_ms").genotype for table in tables]
    assert worst <= min(both.of(genotype).costs["latency_ms"] for genotype in alone) + 1e-9
    whole, apart = Genotype.of(bank.teacher.config), 0
    for share in (0.6, 0.65, 0.7, 0.75, 0.8, 0.85):
        chosen = both.best({"latency_ms": share * both.of(whole).costs["latency_ms"]}).genotype
        assert max(ratios(tables, chosen)) <= share + 1e-9
        singles = [programme_of(bank, t).best({"latency_ms": share * t.latency_ms(whole)}).genotype for t in tables]
        apart += any(max(ratios(tables, single)) > share for single in singles)
    assert apart  # one device's best is too slow on the other


@pytest.mark.parametrize("weights", [None, [2.0, 1.0]])
def test_the_encoding_and_bayes_know_it(tables, bank, weights):
    both = DeviceTables(tables, weights)
    programme = programme_of(bank, both)
    encoding = Encoding(bank.space, programme)
    codes = list(itertools.islice(bank.space.codes(), 0, None, 53))
    rows = encoding.rows(codes)
    wanted = [both.latency_ms(bank.space.from_code(code)) for code in codes]
    assert rows[:, encoding.columns["latency_ms"]].tolist() == pytest.approx(wanted)
    caps = {"latency_ms": 0.9 * both.latency_ms(Genotype.of(bank.teacher.config))}
    search = BayesSearch(bank.space, 6, seed=0, num_initial=4, programme=programme, caps=caps)
    while not search.finished:
        for genotype in search.pending or search.ask(1):
            assert both.latency_ms(genotype) <= caps["latency_ms"] * (1 + 1e-6)
            search.tell(genotype, (1 + programme.of(genotype).score, both.latency_ms(genotype)))
    assert search.evaluated == 6


def test_select_keeps_a_budget_on_every_device(tables, run, bank, tmp_path):
    whole = Genotype.of(bank.teacher.config)
    DeviceTables(tables).to_json(run / "latency" / "table.json")
    exact = ExactChoice.of(run)
    choice = select(run, max_latency_ratio=0.75, output=tmp_path / "by-ratio", exact=exact)
    devices = choice["devices"]
    shares = [each["predicted_latency_ms"] / each["teacher_latency_ms"] for each in devices.values()]
    assert max(shares) <= 0.75 * (1 + 1e-9)
    assert devices["iPhone"]["teacher_latency_ms"] == pytest.approx(tables[1].latency_ms(whole))
    latency = {genotype.hash: [t.latency_ms(genotype) for t in tables] for genotype in bank.space.all()}
    budget = float(np.median([max(each) for each in latency.values()]))
    choice = select(run, max_latency_ms=budget, output=tmp_path / "by-ms", exact=exact)
    scores = {genotype.hash: exact.programme.of(genotype).score for genotype in bank.space.all()}
    assert choice["score"] == pytest.approx(min(scores[h] for h, each in latency.items() if max(each) <= budget))
    assert set(choice["caps"]) == {"latency_ms[Galaxy]", "latency_ms[iPhone]"}


def test_a_file_of_several(tables, tmp_path):
    path = tmp_path / "table.json"
    for weights in (None, [1.0, 2.0]):
        both = DeviceTables(tables, weights)
        both.to_json(path)
        again = load_table(path)
        assert isinstance(again, DeviceTables) and again.hash == both.hash and again.weights == weights
    tables[0].to_json(tmp_path / "one.json")
    assert isinstance(load_table(tmp_path / "one.json"), LatencyTable)
    data = json.loads(path.read_text())
    for change, said in (
        ({"weights": [1.0, 1.0]}, "states the hash .* it was changed"),
        ({"tables": data["tables"][:1]}, "1 latency tables are given"),
        ({"tables": 7}, "holds no list of tables"),
        ({"weights": ["a"]}, r"weights is \['a'\]"),
        ({"tables": [data["tables"][0], {**data["tables"][1], "trunk_ms": 2.0}]}, "table 1 states the hash"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(EdgeDiTError, match=said):
            load_table(path)


def test_tables_that_do_not_belong_together(tables, make_transformer):
    own = tables[0]
    other = of_device(own, "Pixel", [1.0, 1.0, 1.0, 1.0], 1.0, batch=9)
    with pytest.raises(EdgeDiTError, match=r"do not belong together: batch 4 \(Galaxy\) / 9 \(Pixel\)"):
        DeviceTables([own, other])
    other = of_device(own, "Pixel", [1.0, 1.0, 1.0, 1.0], 1.0, trunk={**own.trunk, "sample_size": 32})
    with pytest.raises(EdgeDiTError, match=r"sample_size 8 \(Galaxy\) / 32 \(Pixel\)"):
        DeviceTables([own, other])
    for weights in ([1.0], [1.0, 0.0], [1.0, -2.0]):
        with pytest.raises(EdgeDiTError, match="for 2 tables; give a number above 0 for each"):
            DeviceTables(tables, weights)
    assert list(DeviceTables([own, own]).devices) == ["Galaxy, onnxruntime-int8 #1", "Galaxy, onnxruntime-int8 #2"]


def test_what_a_recipe_names(tables, bank, tmp_path):
    """A phone's table is taken on any machine; another batch, a protocol that is not said, are not."""
    for name, table in zip("ab", tables):
        table.to_json(tmp_path / f"{name}.json")
    config, space = bank.teacher.config, bank.space
    names = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    options = LatencyConfig(table=names[0], batch_size=4, threads=7, precision="fp32")
    assert given_tables(options, config, space).hash == tables[0].hash
    both = given_tables(dataclasses.replace(options, table=names, weights=[1.0, 2.0]), config, space)
    assert both.hash == DeviceTables(tables, [1.0, 2.0]).hash and table_names(None) == []
    with pytest.raises(EdgeDiTError, match=r"latency.table is .*a.json: .*batch_size 4 \(table\) / 1 \(here\)"):
        given_tables(dataclasses.replace(options, batch_size=1), config, space)
    with pytest.raises(EdgeDiTError, match=r"sample_size 8 \(table\) / 16 \(model\)"):
        given_tables(options, {**config, "sample_size": 16}, space)
    unsaid = {**PROTOCOL, "drift": None, "backend": None}
    silent = of_device(tables[0], "Galaxy", [4.0, 3.0, 2.0, 1.0], 1.0, protocol=unsaid)
    silent.to_json(tmp_path / "c.json")
    with pytest.raises(EdgeDiTError, match="of Galaxy was imported, but its protocol does not say backend, drift"):
        given_tables(dataclasses.replace(options, table=[names[0], str(tmp_path / "c.json")]), config, space)
    assert given_files(names) == [tmp_path / "a.json", tmp_path / "b.json"] and files_hash([]) is None
    assert files_hash(given_files(names)) != files_hash(given_files(names[::-1]))
