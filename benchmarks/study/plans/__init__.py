"""Which experiments there are, for which images."""

from typing import Any

from benchmarks.study.experiment import Plan
from benchmarks.study.plans import fashion_mnist, photographs, vit_s

__all__ = ['NAMED', 'plan_of']

NAMED = {'vit-s': vit_s.PLAN}  # that are asked for by name


def plan_of(images: Any, name: str = '') -> Plan:
    """The plan that ``name`` is or ends with, or the one for images of so many channels and pixels."""
    for called, plan in NAMED.items():
        if name.endswith(called):
            return plan
    mean, size = (images['mean'], images['size']) if isinstance(images, dict) else (images.mean, images.size)
    return fashion_mnist.PLAN if len(mean) == 1 else photographs.SMALL if size < 64 else photographs.PLAN
