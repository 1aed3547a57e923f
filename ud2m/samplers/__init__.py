"""Samplers of p(x | y): ours, and those it is compared with."""
