"""Encoders: save and load them, and find them by what a user writes (a run, a file, a torchvision name)."""
