"""What every stage needs: configuration, stages, state, optimisation, command line.

Imports nothing of the rooms below.
"""
