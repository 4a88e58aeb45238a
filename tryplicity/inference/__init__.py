"""Generating text: loading a run, sampling, streaming."""
