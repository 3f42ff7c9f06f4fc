"""The project is described by setup.cfg. This only keeps `optimum` out of the list of top-level names that the package
claims:

its command lies in optimum's namespace, and diffusers would warn of two distributions called optimum at every import.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info


class EggInfo(egg_info):
    def run(self) -> None:
        super().run()
        Path(self.egg_info, "top_level.txt").write_text("edgedit_hf\n", encoding="utf-8")


setup(cmdclass={"egg_info": EggInfo})
