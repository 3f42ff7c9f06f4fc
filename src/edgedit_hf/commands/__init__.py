"""The `edgedit` console script (`cli`) and the optimum-cli command (`export`). Heavy imports stand inside the
functions.
"""
