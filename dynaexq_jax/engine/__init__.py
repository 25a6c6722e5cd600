"""Prefill, decode loop and sampling over batch slots of a fixed size."""
