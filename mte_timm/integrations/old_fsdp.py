"""Private parts of torch 2.0's FSDP that DINOv2 uses and that later torch has changed; importing supplies them.

Only in a process that imports this module, after ``dinov2.fsdp``.
"""

import sys
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp._runtime_utils import _reshard

__all__: list[str] = []


def _free(x: Any) -> None:
    """Frees the parameters that ``x`` has gathered; there is one handle now, where there was a list."""
    if isinstance(x, FullyShardedDataParallel) and x.sharding_strategy is not ShardingStrategy.NO_SHARD and x._handle:
        _reshard(x, x._handle, True)


if host := sys.modules.get('dinov2.fsdp'):
    host.free_if_fsdp = _free  # type: ignore[attr-defined]
    # DINOv2 lets its roots share their streams, which saves memory and changes no value; they have others now
    FullyShardedDataParallel._streams = None  # type: ignore[attr-defined]
