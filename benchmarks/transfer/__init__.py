"""What published backbones are worth on other tasks; see ``python -m benchmarks.transfer --help``."""
