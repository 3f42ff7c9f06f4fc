"""Lowering to Core ML, and an interpreter of the saved program."""
