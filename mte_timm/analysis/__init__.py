"""What the tokens of a wrapped model know: the paper's analyses (section 4) for your own model and images.

    tokens = analysis.collect(model, loader)            # the model runs once
    analysis.plot_cka(tokens).savefig('cka.png')

Plain tensors, each with a ``plot_*`` twin. Needs matplotlib and scikit-learn: ``pip install 'mte-timm[analysis]'``.
"""

from .health import *  # noqa: F403
from .measures import *  # noqa: F403
from .plots import *  # noqa: F403
from .predict import *  # noqa: F403
