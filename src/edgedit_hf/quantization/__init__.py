"""Low-bit weights: palettes and affine grids, what they cost in accuracy, how many bits each layer gets, and the files
that hold them.
"""
