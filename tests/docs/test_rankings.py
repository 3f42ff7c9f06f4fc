"""The tables of rank correlations on the page of the search are those of the committed results."""

import json
from pathlib import Path

import pytest

from edgedit_hf.records import Ranking
from edgedit_hf.report.ranking import ranking_table
from edgedit_hf.schema import check

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("ranking-*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_the_page_has_the_tables_and_commands_of_the_results(path):
    result = json.loads(path.read_text())
    check(result["ranking"], Ranking, path.name)
    page = " ".join((ROOT / "docs" / "search.md").read_text().split())
    assert " ".join(ranking_table(result["ranking"]).split()) in page.replace(" <!-- /ranking -->", "")
    assert result["machine"] in page and " ".join(result["command"].split()) in page.replace("\\ ", "")
    assert len(result["ranking"]["genotypes"]) >= 12


def test_there_are_results_for_two_data_sets():
    assert [path.stem for path in RESULTS] == ["ranking-digits", "ranking-fashion"]
