"""Converters: public checkpoints of transformers and timm into models of the zoo, with equal outputs.

Neither library is needed. A converter is a table of names and a few functions: `convert.llama` is a short one to copy.
"""

from ._convert import Conversion, convert, convert_report, make_plan
from ._names import Plan, Split
from ._registry import Converter, converter_info, list_converters, register_converter

__all__ = [
    "Conversion",
    "Converter",
    "Plan",
    "Split",
    "convert",
    "convert_report",
    "converter_info",
    "list_converters",
    "make_plan",
    "register_converter",
]
