"""The project is described by setup.cfg; two things need code.

`optimum` is kept out of the list of top-level names that the package claims: its command lies in optimum's namespace,
and diffusers would warn of two distributions called optimum at every import. And a package index has the README alone,
where its links into the repository and its picture, as a clone and its web view need them, would lead nowhere.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info


class EggInfo(egg_info):
    def run(self) -> None:
        super().run()
        Path(self.egg_info, "top_level.txt").write_text("edgedit_hf\n", encoding="utf-8")


def long_description() -> str:
    """The README without its picture and the line below, and with the text alone of links into the repository."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?://)[^)]*\)\n\n\*[^*]*\*\n\n", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?://)[^)]*\)", r"\1", text)


setup(cmdclass={"egg_info": EggInfo}, long_description=long_description())
