"""From a bank and a latency table to an assembled student without a search."""

import json

import pytest
import torch

from edgedit_hf import EdgeDiTTransformer2DModel, Genotype
from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.search.exact import ExactChoice, was_searched
from edgedit_hf.search.latency_table import LatencyTable
from edgedit_hf.search.selection import select


def test_the_least_loss_within_the_bounds_is_assembled(unsearched):
    folder, bank = unsearched
    assert not was_searched(folder)
    exact = ExactChoice.of(folder)
    memory = exact.whole.costs["memory"] / 1e6
    table, every = LatencyTable.from_json(folder / "latency" / "table.json"), list(bank.space.all())
    for bounds, fits in (
        ({"max_latency_ms": 7.0}, lambda s: s.costs["latency_ms"] <= 7.0 * (1 + 1e-9)),
        ({"max_parameters_ratio": 0.6}, lambda s: s.costs["parameters"] <= 0.6 * exact.whole.costs["parameters"]),
        (
            {"max_latency_ratio": 0.9, "max_flops_ratio": 0.5},
            lambda s: s.costs["flops"] <= 0.5 * exact.whole.costs["flops"],
        ),
        ({"max_bytes_mb": 0.042}, lambda s: s.costs["bytes"] <= 0.042e6),
        ({"max_memory_mb": 0.8 * memory}, lambda s: s.costs["memory"] <= 0.8e6 * memory),
    ):
        choice = select(folder, **bounds, exact=exact)
        assert choice["score"] == min(s.score for s in map(exact.programme.of, every) if fits(s))
        assert choice["memory"] == exact.programme.of(bank.space.from_code(choice["code"])).costs["memory"]
        assert (choice["gap"], choice["chosen_by"], choice["bytes_precision"]) == (0.0, "programme", "int8")
        assert json.loads((folder / "student" / "choice.json").read_text()) == choice
        genotype = bank.space.from_code(choice["code"])
        assert choice["predicted_latency_ms"] == pytest.approx(table.latency_ms(genotype))
        assert choice["genotype_hash"] == genotype.hash and "(proved); nothing was evaluated" in choice["reason"]
        student = EdgeDiTTransformer2DModel.from_pretrained(folder / "student" / "transformer")
        assert Genotype.of(student.config) == genotype
        for name, tensor in bank.assemble(genotype).state_dict().items():
            assert torch.equal(student.state_dict()[name], tensor), name


def test_without_bounds_the_knee_of_a_sweep(unsearched):
    exact = ExactChoice.of(unsearched[0])
    solution, facts = exact.choose({})
    front = exact.programme.front(33)
    assert solution in front and facts["caps"] == {} and f"knee point of the {len(front)} points" in facts["reason"]
    assert 0 < solution.score < max(each.score for each in front)


def test_bounds_that_nothing_meets_write_nothing(unsearched):
    folder = unsearched[0]
    with pytest.raises(EdgeDiTError, match="No student has latency_ms <= 1, but the least is 3.5. Raise"):
        select(folder, max_latency_ms=1.0, exact=ExactChoice.of(folder))
    assert not (folder / "student").exists()


def test_what_is_missing_unfinished_or_foreign_is_named(unsearched, make_transformer):
    folder, _ = unsearched
    for other in (folder / "nowhere", folder / "teacher", folder / "latency" / "table.json"):
        with pytest.raises(
            EdgeDiTError, match=f"{other} is not the folder of a run: it holds no teacher, bank or latency"
        ):
            ExactChoice.of(other)
    (folder / "latency" / "run.json").write_text("{}")
    with pytest.raises(EdgeDiTError, match=r"latency is unfinished; run stage latency"):
        ExactChoice.of(folder)
    (folder / "latency" / "run.json").unlink()
    (folder / "teacher").rename(folder / "elsewhere")
    with pytest.raises(EdgeDiTError, match="has no teacher of its own; give the one"):
        ExactChoice.of(folder)
    assert ExactChoice.of(folder, str(folder / "elsewhere")).whole.score == 0.0
    make_transformer(seed=1).save_pretrained(folder / "elsewhere" / "transformer")
    with pytest.raises(EdgeDiTError, match="was made from a teacher with hash"):
        ExactChoice.of(folder, str(folder / "elsewhere"))
    (folder / "elsewhere").rename(folder / "teacher")
    (folder / "latency" / "table.json").unlink()
    with pytest.raises(EdgeDiTError, match="table.json does not exist.*stage latency"):
        ExactChoice.of(folder)
