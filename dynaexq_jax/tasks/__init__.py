"""Benchmarks: what they ask of a model, answered by an engine; and lm-eval, which asks."""
