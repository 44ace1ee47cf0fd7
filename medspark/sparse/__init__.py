"""Block-sparse volumes: the mask travels with the data, and any CNN runs on it. Needs torch only."""

from medspark.sparse import elementwise as _elementwise  # noqa: F401  (registers torch functions)
from medspark.sparse import handlers as _handlers  # noqa: F401  (the same)
from medspark.sparse import reference
from medspark.sparse._backend import current_backend, use_backend
from medspark.sparse._ext import extension_status, launches, reset_launches
from medspark.sparse.mask import BlockMask, Level, Semantics
from medspark.sparse.ops.densify import densify
from medspark.sparse.tensor import BlockSparseTensor

__all__ = [
    "BlockMask",
    "BlockSparseTensor",
    "Level",
    "Semantics",
    "current_backend",
    "densify",
    "extension_status",
    "launches",
    "reference",
    "reset_launches",
    "use_backend",
]
