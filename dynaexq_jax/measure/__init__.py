"""Measures an engine under traffic: latencies, throughput, and whom its high precision served."""
