"""Multi-Token Enhancing (MTE, arXiv 2411.15787) for timm models.

>>> import torch, mte_timm as mte
>>> model = mte.wrap('test_vit', num_classes=0)          # any timm model
>>> out = model(torch.randn(2, 3, 160, 160))             # out.output, out.aux, out.tokens
>>> loss = mte.MTELoss(torch.nn.MSELoss())(out, out)     # any criterion
>>> plain = mte.strip(model)                             # the plain timm model
"""

from . import integrations as _adapters  # noqa: F401  # of other repositories' classes
from .auxiliary import MTEConfig, MTEOutput, MTETokens
from .finite import check_finite
from .losses import MTECrossEntropy, MTELoss
from .model import MTE, make_teacher, wrap
from .publish.checkpoints import StripReport, strip_checkpoint
from .publish.export import save_pretrained, strip
from .publish.hub import model_card, push_to_hub
from .publish.loading import CheckpointError
from .version import __version__ as __version__

__all__ = [
    'MTE',
    'CheckpointError',
    'MTEConfig',
    'MTECrossEntropy',
    'MTELoss',
    'MTEOutput',
    'MTETokens',
    'StripReport',
    'check_finite',
    'make_teacher',
    'model_card',
    'push_to_hub',
    'save_pretrained',
    'strip',
    'strip_checkpoint',
    'wrap',
]
