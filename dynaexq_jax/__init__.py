"""Serves Qwen3-MoE models on one GPU, with expert precision that follows the traffic."""
