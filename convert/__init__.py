"""Hugging Face safetensors to converted checkpoints."""
