"""Benchmarks of serving: a load generator for any OpenAI-compatible server, offline runs, sweeps, bounds, reports."""
