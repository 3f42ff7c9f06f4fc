"""Jinja templates of the model card and the run report; in an installed package: `edgedit_hf.hub_cards`."""
