"""Calibrated conversion: the model runs text, layer by layer, while it is quantized."""

from convert.calibration.converter import CalibratedConverter
from convert.calibration.quantizing import HessianQuantizer
from convert.calibration.text import CalibrationConfig, CalibrationText, read_calibration

__all__ = [
    "CalibratedConverter",
    "CalibrationConfig",
    "CalibrationText",
    "HessianQuantizer",
    "read_calibration",
]
