"""Checks of a machine, before a long run is started on it."""
