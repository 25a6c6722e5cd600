"""What the tests of calibrated conversion share: a fast quantizer, a small model, short texts."""

from pathlib import Path

import numpy as np

import convert.pipeline
from convert import convert as run_convert
from convert.calibration import CalibrationConfig
from convert.quantize import GridQuantizer, Quantized

TEXT = Path(__file__).parents[1] / "examples" / "text"
FILES = tuple(TEXT / f"{name}.txt" for name in ("en", "python", "fr"))
WINDOW, ROWS = 24, 5


class FastQuantizer:
    """Stands for the joint quantizer: codes depend on the Hessians, scales do not."""

    def __init__(self):
        self.calls = []

    def describe(self):
        return {"name": "fast"}

    def __call__(self, weights, hessians, fmt):
        hessians = np.asarray(hessians)
        self.calls.append((weights, hessians))
        parts = [GridQuantizer()(matrix, fmt) for matrix in weights]
        codes = np.stack([part.codes for part in parts])
        often = np.diagonal(hessians, axis1=1, axis2=2)
        rare = often < np.median(often, axis=1, keepdims=True)
        codes = np.where(rare[:, None], codes & 0xF0, codes)
        return Quantized(codes, np.stack([part.scales for part in parts]))


def calibration(files=FILES, rows=ROWS, window=WINDOW):
    return CalibrationConfig(files=tuple(files), rows=rows, window=window)


def run(source, output, monkeypatch, config=None, **options):
    """Converts with the fast quantizer; returns it and the summary."""
    quantizer = FastQuantizer()
    monkeypatch.setattr(convert.pipeline, "JointQuantizer", lambda: quantizer)
    config = config or calibration()
    summary = run_convert(source, output, calibration=config, progress=False, **options)
    return quantizer, summary


def make_model(make_tiny_model, path, **options):
    make_tiny_model(path, tokenizer=True, vocab_size=8192, **options)
    return path
