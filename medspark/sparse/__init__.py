"""Block-sparse volumes: the mask travels with the data, and any CNN runs on it. Needs torch only."""

from medspark.sparse import (  # torch functions that modules call are registered on import
    elementwise,  # noqa: F401
    norms,  # noqa: F401
    pools,  # noqa: F401
    reductions,  # noqa: F401
    reference,
    resize,  # noqa: F401
    shape,  # noqa: F401
)
from medspark.sparse._backend import current_backend, use_backend
from medspark.sparse._ext import extension_status, launches, reset_launches
from medspark.sparse.convert import (
    coordinates,
    from_minkowski,
    from_sparse_coo,
    from_spconv,
    to_minkowski,
    to_sparse_coo,
    to_spconv,
)
from medspark.sparse.convolutions import conv, conv_transpose
from medspark.sparse.mask import BlockMask, Level, Semantics
from medspark.sparse.ops.densify import densify
from medspark.sparse.ops.transfer import restrict
from medspark.sparse.sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm
from medspark.sparse.tensor import BlockSparseTensor

__all__ = [
    "BlockMask",
    "BlockSparseTensor",
    "Level",
    "Semantics",
    "SyncBatchNorm",
    "conv",
    "conv_transpose",
    "convert_sync_batchnorm",
    "coordinates",
    "current_backend",
    "densify",
    "extension_status",
    "from_minkowski",
    "from_sparse_coo",
    "from_spconv",
    "launches",
    "reference",
    "reset_launches",
    "restrict",
    "to_minkowski",
    "to_sparse_coo",
    "to_spconv",
    "use_backend",
]
