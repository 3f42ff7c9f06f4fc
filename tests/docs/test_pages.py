"""What the pages must keep to: the README's size and first screen, a navigation that has every page, links that lead
somewhere, on PyPI too. That the site builds is `mkdocs build --strict`'s business, in `make check`; that every command
runs, test_blocks.py's.
"""

import ast
import re
import runpy
from pathlib import Path

import pytest
import yaml

from edgedit_hf.menu_space import MENU_KEYS, MenuSpace
from edgedit_hf.run.config import load_config
from edgedit_hf.run.stage import TEXT_TO_IMAGE

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
AT_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PAGES = [*AT_ROOT.values(), *sorted(path.relative_to(ROOT).as_posix() for path in DOCS.glob("**/*.md"))]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def nav() -> list[str]:
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    return pages(yaml.safe_load(text_of("mkdocs.yml"))["nav"])


def anchors(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_the_readme_is_a_first_screen():
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 9000
    first = "\n".join(readme.decode().splitlines()[:40])
    assert "make demo " in first and "make demo-t2i " in first and "DiffusionPipeline.from_pretrained" in first
    pictures = re.findall(r"!\[.+?\]\((.*?)\)", first)
    assert len(pictures) == 1


def test_pictures_are_small():
    pictures = sorted(DOCS.glob("images/*"))
    assert pictures and all(path.stat().st_size < 200_000 for path in pictures)


def test_the_diagrams_are_those_of_their_script(tmp_path):
    script = runpy.run_path(str(DOCS / "diagrams.py"))
    script["main"](tmp_path)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("images/how-*.svg")}
    page = text_of("docs/how-it-works.md")
    assert len(drawn) == 10 and all(f"(images/{name})" in page for name in drawn)


def test_the_navigation_has_every_page():
    assert sorted(nav()) == sorted(
        [*AT_ROOT, *(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/"))]
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((.*?)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), f"{page} links to {target}"
        inside = file.resolve().relative_to(ROOT).as_posix()
        assert not anchor or anchor in anchors(inside), f"{page} links to {target}"
        # A page of docs/ knows the pages at the root by no name that both GitHub and the site have.
        assert inside.startswith("docs/") or not page.startswith("docs/"), f"{page} links to {target}"


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w/-]+\.md)\)", text_of("README.md")))
    assert linked == {page for page in nav() if not page.startswith("api/")} - set(AT_ROOT)


def test_the_site_rewrites_links_of_pages_at_the_root():
    source: dict = {}
    hooks = (DOCS / "hooks.py").read_text().replace("from mkdocs.structure.files import File", "")
    exec(compile(hooks, "hooks.py", "exec"), source)
    assert source["ROOT_PAGES"] == {root: page for page, root in AT_ROOT.items()}
    text = "![x](docs/images/x.png) [a](docs/a.md#b) [c](CONTRIBUTING.md) [d](https://docs/x)"
    assert source["site_links"](text) == "![x](images/x.png) [a](a.md#b) [c](contributing.md) [d](https://docs/x)"


def test_every_recipe_benchmark_and_stage_stands_on_a_page():
    everything = "".join(text_of(page) for page in PAGES)
    for path in [*ROOT.glob("training/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("training/*/*.yaml")]:
        shared = path.name in ("__init__.py", "diffusers_dit.py")
        assert shared or f"{path.name}" in everything, f"no page names {path.relative_to(ROOT)}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/api/")])
def test_the_reference_names_what_is_there(page):
    for name in re.findall(r"^::: edgedit_hf\.([\w.]+)$", text_of(page), flags=re.M):
        module = ROOT / "src/edgedit_hf" / Path(*name.split("."))
        if module.with_suffix(".py").is_file():
            continue
        defined = ast.parse(module.parent.with_suffix(".py").read_text(encoding="utf-8")).body
        assert module.name in {getattr(node, "name", None) for node in defined}, f"{page} names {name}"


def test_every_command_stands_on_its_page():
    modules = {path.stem for path in (ROOT / "src/edgedit_hf/commands").glob("*.py")} - {"__init__", "cli", "export"}
    rows = re.findall(r"^\| `(.+?)`", text_of("docs/commands.md"), flags=re.M)
    assert {row.split()[1] for row in rows if row.startswith("edgedit")} == modules
    assert "optimum-cli export edgedit" in rows


def test_the_page_about_the_inside_has_every_room_in_import_order():
    named = [
        name.removesuffix(".py") for name in re.findall(r"^\| `(\w+)(?:\.py|/)` \|", text_of("docs/inside.md"), re.M)
    ]
    source = ROOT / "src" / "edgedit_hf"
    there = {path.stem for path in source.glob("*.py")} | {path.parent.name for path in source.glob("*/*.py")}
    assert set(named) == there - {"__init__", "edgedit_hf"}
    for node in ast.parse(text_of("tests/test_imports.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER":
            assert named == [name for name in ast.literal_eval(node.value) if name in there]


def test_the_menu_of_the_page_is_one_with_every_kind_of_choice():
    (block,) = re.findall(r"^```yaml\n(bank:.*?)^```", text_of("docs/bank.md"), flags=re.DOTALL | re.MULTILINE)
    menu = yaml.safe_load(block)["bank"]["menu"]
    assert load_config(ROOT / "training/recipes/imagenet256-edgedit1.yaml", [f"bank.menu={menu}"]).bank.menu == menu
    space = MenuSpace(28, 1152, 16, menu=menu)
    assert {key for entry in menu for key in entry} == set(MENU_KEYS)
    assert {choice.merge for choice in space.choices} == {1, 2, 3}
    explained, measured = text_of("docs/bank.md").split("### What it buys")
    for name in re.findall(r"`((?:attn|heads|static|rank|tokens)[\w-]*)`", explained):
        assert name in space.options, name
    recipe = load_config(ROOT / "training/recipes/digits-menu.yaml")
    choices = MenuSpace(6, 128, 4, menu=recipe.bank.menu).choices
    rows = re.findall(r"^\| (\d) \| `([\w-]+)` \|", measured, flags=re.M)
    assert {(int(merge), name) for merge, name in rows} == {(choice.merge, choice.option) for choice in choices} - {
        (1, "original")
    }


def test_the_page_of_text_to_image_lists_its_stages():
    rows = re.findall(r"^\| ([\w-]+) \| `(\w+\.py)` \|", text_of("docs/text-to-image.md"), flags=re.M)
    assert rows == [(stage.name, stage.script) for stage in TEXT_TO_IMAGE]


def test_the_citation_names_package_and_papers():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors", "type"} <= set(citation)
    papers = {value["value"] for paper in citation["references"] for value in paper["identifiers"]}
    assert papers == {"arXiv:2603.28405", "arXiv:2601.08303"}
    assert all(paper["title"] and paper["authors"] for paper in citation["references"])
