"""What people look at: heat maps of precision by layer and expert."""

from dynaexq_jax.report.heatmap import heatmap_png, heatmap_text

__all__ = ["heatmap_png", "heatmap_text"]
