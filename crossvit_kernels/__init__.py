"""Kernels for CrossViT: operations on tensors, each with a definition and the backends that compute it.

Public and kept stable within a major version: the names in `__all__`. Everything else is private.
Importing this package initialises no CUDA and imports no Triton.
"""

from importlib.metadata import version

from .backends import backends, use_backend
from .cross_attention import cross_attention
from .cross_fusion import FusionWeights, cross_fusion
from .linear import PreparedLinear, linear, pack_linear
from .patch_embed import add_position, patch_embed
from .self_attention import self_attention
from .transformer_block import BlockWeights, transformer_block
from .validation import validate

__all__ = [
    "BlockWeights", "FusionWeights", "PreparedLinear", "__version__", "add_position", "backends",
    "cross_attention", "cross_fusion", "linear", "pack_linear", "patch_embed", "self_attention",
    "transformer_block", "use_backend", "validate",
]  # fmt: skip
__version__ = version("crossvit-kernels")
