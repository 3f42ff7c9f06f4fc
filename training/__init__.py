"""One Accelerate recipe a stage; in an installed package: `edgedit_hf.training`, copied out by `edgedit recipes
copy`.
"""
