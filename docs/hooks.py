"""What mkdocs adds to docs/: the pages that stand at the repository's root, and the recipe with all keys.

README, CONTRIBUTING and CHANGELOG link to each other and to docs/ by relative paths, as a clone and its web view need
them; here the same links are written as the site needs them.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ALL_KEYS = "<!-- all keys -->"


def site_links(text: str) -> str:
    """Links of a page at the root as links of a page in docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for name, page in ROOT_PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=site_links((root / name).read_text(encoding="utf-8"))))
    return files


def on_page_markdown(markdown, page, config, files):
    if ALL_KEYS not in markdown:
        return markdown
    from edgedit_hf.run.config import commented_yaml

    return markdown.replace(ALL_KEYS, f"```yaml\n{commented_yaml([])}```")


def on_page_content(html, page, config, files):
    """Names that docstrings put in brackets, [`Name`] or [`~module.Name`], as code."""
    return re.sub(r"\[<code>(?:~[\w.]*?)?(\w+(?:\.\w+)?)</code>\]", r"<code>\1</code>", html)
