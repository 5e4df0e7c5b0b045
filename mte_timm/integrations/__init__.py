"""What `patches/` calls in other repositories, a file each, with adapters for their classes of backbones."""

from . import dino, ibot, moby  # noqa: F401  # their adapters
