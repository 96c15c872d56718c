"""Backends: what runs a pipeline."""
