"""Random and Bayesian search over training: trials of one study, by several workers, that survive kills."""
