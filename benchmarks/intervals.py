"""Differences with intervals, and what they say of a claim.

Owns statistics of paired runs. Knows nothing of what was run.
"""

import math
import statistics
from typing import NamedTuple, Optional

__all__ = ['MARGIN', 'Difference', 'difference']

MARGIN = 1.0  # points within which a difference is none


class Difference(NamedTuple):
    """Of two variants with the same seeds."""

    mean: float
    half_width: float  # of the 95% interval, infinite for one seed
    seeds: int
    reference: float  # means over these seeds
    ours: float

    def __str__(self) -> str:
        return f'{self.mean:+.1f}' + ('' if math.isinf(self.half_width) else f' ± {self.half_width:.1f}')

    def verdict(self, expected: int = 1) -> str:
        """What the interval says of a claim that the difference has the sign ``expected``, or is none where it is 0."""
        if self.seeds < 3:  # two can agree by chance
            return 'one seed' if self.seeds == 1 else 'two seeds'
        if expected == 0:
            if abs(self.mean) + self.half_width <= MARGIN:
                return 'confirmed'
            return 'contradicted' if abs(self.mean) > self.half_width else 'undecided'
        if abs(self.mean) <= self.half_width:
            return 'undecided, leaning for' if self.mean * expected > 0 else 'undecided, leaning against'
        return 'confirmed' if self.mean * expected > 0 else 'contradicted'


def difference(ours: dict[int, float], reference: dict[int, float]) -> Optional[Difference]:
    """Mean and 95% interval (Student's t) of the paired differences, seed by seed; None without a common seed."""
    seeds = sorted(ours.keys() & reference.keys())
    if not seeds:
        return None
    pairs, half_width = [ours[s] - reference[s] for s in seeds], math.inf
    if len(pairs) > 1:
        from scipy.stats import t

        half_width = float(t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    means = (statistics.mean(of[s] for s in seeds) for of in (reference, ours))
    return Difference(statistics.mean(pairs), half_width, len(seeds), *means)
