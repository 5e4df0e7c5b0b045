"""What the tokens of a wrapped model know: the paper's analyses (section 4) for your own model and images.

    tokens = analysis.collect(model, loader)            # the model runs once
    analysis.plot_cka(tokens).savefig('cka.png')

Plain tensors from `measures.py`, each with a ``plot_*`` twin in `plots.py`. Needs matplotlib
and scikit-learn: ``pip install -e '.[analysis]'`` in a clone.
"""

from .measures import *  # noqa: F403
from .measures import __all__ as _measures
from .plots import *  # noqa: F403
from .plots import __all__ as _plots

__all__ = [*_measures, *_plots]
