"""Shared by tests: tiny runs and configs, data sets, ports, injected faults, hostile files."""
