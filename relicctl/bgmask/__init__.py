"""Masks without labels: hand-made priors, a network trained on them, and how good both are."""
