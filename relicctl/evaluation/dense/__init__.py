"""Encoders in segmentation and detection."""
