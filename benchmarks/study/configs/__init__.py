"""Which experiments there are, for which images."""

from typing import Any

from benchmarks.study.configs import fashion_mnist, photographs
from benchmarks.study.plan import Plan

__all__ = ['plan_of']


def plan_of(images: Any) -> Plan:
    """The plan for images that a mean for each channel describes."""
    mean = images['mean'] if isinstance(images, dict) else images.mean
    return fashion_mnist.PLAN if len(mean) == 1 else photographs.PLAN
