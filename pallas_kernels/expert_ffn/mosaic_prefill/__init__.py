"""The expert feed-forward of many tokens on Hopper: dense tiles of rows, weights as bfloat16.

``rows`` sorts the assignments by expert; ``kernel`` is the matmul over pages, run once for gate
and up and once for down; ``ffn`` puts them together.
"""
