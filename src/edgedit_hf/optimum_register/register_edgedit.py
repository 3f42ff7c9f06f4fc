"""Found by optimum-cli in the namespace `optimum.commands.register` (setup.cfg maps this folder there): adds `export
edgedit`.
"""

from optimum.commands.export.base import ExportCommand

from edgedit_hf.commands.export import EdgeDiTExportCommand

REGISTER_COMMANDS = [(EdgeDiTExportCommand, ExportCommand)]
