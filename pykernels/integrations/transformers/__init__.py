"""Hugging Face transformers: ``fuse_`` a model in one call, and INT8 weights through ``from_pretrained``.

transformers is an optional dependency: ``pip install 'pykernels[transformers]'``. Served are 4.56 and later, and 5.x.
"""

from __future__ import annotations

from ._version import check_version

check_version()

from .fuse import fuse_, unfuse_  # noqa: E402
from .int8 import PykernelsInt8Config  # noqa: E402
from .lora import int8_lora  # noqa: E402
from .report import FusionReport  # noqa: E402

__all__ = ["FusionReport", "PykernelsInt8Config", "fuse_", "int8_lora", "unfuse_"]
