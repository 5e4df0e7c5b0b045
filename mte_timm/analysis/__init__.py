"""What the tokens of a wrapped model know: the paper's analyses (section 4) for your own model and images.

    tokens = analysis.collect(model, loader)            # the model runs once
    analysis.plot_cka(tokens).savefig('cka.png')

Tensors, each with a ``plot_*`` twin. Needs matplotlib and scikit-learn: ``pip install -e '.[analysis]'`` in a clone.
"""

from .health import *  # noqa: F403
from .health import __all__ as _health
from .measures import *  # noqa: F403
from .measures import __all__ as _measures
from .plots import *  # noqa: F403
from .plots import __all__ as _plots
from .predict import *  # noqa: F403
from .predict import __all__ as _predict

__all__ = [*_health, *_measures, *_plots, *_predict]
