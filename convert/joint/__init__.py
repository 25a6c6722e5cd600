"""The calibrated quantizer: all levels of the nested code chosen together against a Hessian."""

from convert.joint.quantizer import JointQuantizer

__all__ = ["JointQuantizer"]
