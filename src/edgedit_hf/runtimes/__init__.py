"""Opening, running and timing artefacts: the only place that knows the runtimes."""
