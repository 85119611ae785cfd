"""Typed configuration: schema, presets, overrides."""
