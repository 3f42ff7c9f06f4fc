"""What every stage of a run needs: configuration, stages, state, optimisation, command line. Imports nothing of the rooms below."""
