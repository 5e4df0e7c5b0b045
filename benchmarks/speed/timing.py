"""Timing forms of one thing side by side. Knows nothing of what runs."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ['interleaved', 'summary']

LEAST_SECONDS = 30


def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, device: str = 'cpu') -> dict[str, list[float]]:
    """Seconds of each run in each round, after one round to warm up; every other round in reverse order.

    At least ``rounds`` of them, and where a run is short so many that they take half a minute.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    i, begin = 0, time.perf_counter()
    while i <= rounds or time.perf_counter() - begin < LEAST_SECONDS:
        for name in list(runs) if i % 2 else reversed(list(runs)):
            synchronize(device)
            start = time.perf_counter()
            runs[name]()
            synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
        i += 1
    return seconds


def summary(seconds: list[float], plain: list[float]) -> dict[str, float]:
    """Median and quartiles of the time, and of the ratio to the plain form in the same round."""
    ratios = [s / p for s, p in zip(seconds, plain)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {'seconds': statistics.median(seconds), 'ratio': statistics.median(ratios), 'low': low, 'high': high}
