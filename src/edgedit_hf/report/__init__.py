"""Reports, plots and model cards, all made from the measured JSON of a run."""
