"""ReLICv2 pretraining: its data, its training task, and an estimate of its cost."""
