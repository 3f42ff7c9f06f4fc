"""Multi-objective search of genotypes: objectives, latency table, Bayesian optimisation, Pareto front."""
