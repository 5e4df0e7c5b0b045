"""The packages that the analyses need beyond the library's own."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ['extra']


@contextmanager
def extra() -> Iterator[None]:
    """Around imports of those packages.

    Raises:
        ImportError: one is not installed; the message has the command that installs it.
    """
    try:
        yield
    except ImportError as e:
        raise ImportError(
            'mte_timm.analysis draws with matplotlib and classifies with scikit-learn: pip install matplotlib '
            "scikit-learn, or pip install -e '.[analysis]' in a clone of mte-timm"
        ) from e
