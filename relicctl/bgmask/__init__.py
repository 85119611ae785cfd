"""Masks without labels: handcrafted priors, a network trained on them, and how good both are."""
