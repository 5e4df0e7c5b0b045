"""State dicts of wrapped models: what they say beside weights, names of former versions, why weights do not fit."""

from collections.abc import Collection, Mapping
from typing import Any

from .utils import model_args_of, plain_args, size_of_weights, unsaid_args

__all__ = ['FORMER_NAMES', 'FORMER_NAMES_IN_BRANCH', 'misfit', 'remembered', 'rename']

# before 0.1.0 the branch was no module of its own
FORMER_NAMES = {name: f'aux.{name}' for name in ('aux_cls', 'ten.', 'pool.', 'global_head.', 'aux_heads.')}
FORMER_NAMES_IN_BRANCH = {'aux_cls': 'cls_tokens', 'aux_heads.': 'heads.'}


def rename(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Renames entries under ``prefix`` in place: from a former name, or beginning of one that ends in a dot."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        own = key.removeprefix(prefix)
        for former, today in names.items():
            if own == former or (former.endswith('.') and own.startswith(former)):
                state_dict[prefix + today + own.removeprefix(former)] = state_dict.pop(key)


def misfit(
    names: Collection[str], options: Mapping[str, Any], plain: Collection[str], own_options: Mapping[str, Any]
) -> str:
    """Why weights don't fit a wrapped model, beyond torch's list of names; '' where there is nothing to say.

    Args:
        names: Of the weights.
        options: That their model was wrapped with, where they are known.
        plain: Names of the plain model's weights.
        own_options: Of the model that they are loaded into.
    """
    if not any(name.startswith('backbone.') for name in names):
        if len(set(plain) & set(names)) <= len(plain) / 2:
            return ''
        return (
            "these are weights of a plain model, whose names lack 'backbone.': load them into the model that was "
            'wrapped, mte.strip(model).load_state_dict(...), and auxiliary tokens are newly initialized'
        )
    different = [f'{k}={options[k]!r} instead of {v!r}' for k, v in own_options.items() if options.get(k, v) != v]
    if not different or all(name.startswith('backbone.') for name in names):
        return ''
    return (
        f'these weights are of a model with other auxiliary tokens or heads: {", ".join(different)}. Wrap with the '
        "options and head= of that run, or load only what begins with 'backbone.', with strict=False, and auxiliary "
        'tokens are newly initialized'
    )


def remembered(backbone: Any) -> dict[str, Any]:
    """What a state dict says of the timm model in it beside weights: size of the images, name, arguments."""
    size = size_of_weights(backbone)
    said: dict[str, Any] = {'img_size': list(size) if size else None}
    if cfg := getattr(backbone, 'pretrained_cfg', None):
        args = model_args_of(backbone)
        said |= {'architecture': cfg['architecture'], 'model_args': plain_args(args), 'unsaid': unsaid_args(args)}
    return said
