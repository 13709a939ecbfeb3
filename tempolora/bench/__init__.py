"""Measurements behind the figures in docs/, one subcommand each: `python -m tempolora.bench`."""
