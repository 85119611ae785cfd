"""Handcrafted saliency priors: DSR, MC, MR and RBD."""
