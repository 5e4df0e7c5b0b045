"""Publishing: the plain timm model out of a wrapped one, to a folder or to the Hugging Face Hub.

Owns what an export says of itself and that it is whole. Knows nothing of training.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
from torch import nn

from .backbones import input_size
from .model import MTE

__all__ = ['model_card', 'push_to_hub', 'save_pretrained', 'strip']

# fields of timm's pretrained_cfg that tell of the weights which training started from
_OF_OTHER_WEIGHTS = (
    'url',
    'file',
    'hf_hub_id',
    'hf_hub_filename',
    'tag',
    'source',
    'license',
    'origin_url',
    'notes',
    'paper_name',
    'paper_ids',
    'num_samples',
)


def strip(model: nn.Module) -> nn.Module:
    """The plain timm model that was wrapped: the very object, with its trained weights.

    >>> import timm, mte_timm as mte
    >>> plain = timm.create_model('test_vit')
    >>> mte.strip(mte.wrap(plain)) is plain
    True

    Args:
        model: What :func:`wrap` returned; also inside DistributedDataParallel, torch.compile or timm's ModelEma.

    Raises:
        TypeError: ``model`` was not wrapped.
    """
    inner: Any = model
    while not isinstance(inner, MTE):
        children = dict(inner.named_children()) if isinstance(inner, nn.Module) else {}
        nested = [children[name] for name in ('module', '_orig_mod') if name in children]
        if not nested:
            raise TypeError(f'model: a {type(model).__name__} holds no wrapped model; pass what mte.wrap returned')
        inner = nested[0]
    return inner.backbone


def save_pretrained(
    model: nn.Module,
    directory: Union[str, Path],
    *,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    model_args: Optional[dict[str, Any]] = None,
) -> Path:
    """Writes the plain model so that ``timm.create_model('local-dir:DIRECTORY', pretrained=True)`` loads it.

    >>> import tempfile, timm, mte_timm as mte
    >>> model = mte.wrap('test_vit', num_classes=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plain = timm.create_model(f'local-dir:{mte.save_pretrained(model, folder)}', pretrained=True)

    Two files, ``model.safetensors`` and ``config.json``. They are written and checked under another name and
    then moved into place, so an interrupted save leaves what was there before.

    Args:
        model: A wrapped model, or a plain timm model.
        directory: Folder, made if need be. An export that is there already is replaced.
        mean: Mean of the images' channels that training normalised with, where it is not the architecture's.
        std: Their standard deviation.
        model_args: Arguments of ``timm.create_model`` that the model was made with. timm 1.0.31 and newer
            remember them.

    Returns:
        The folder.

    Raises:
        ValueError: timm would not rebuild this model from what is known of it.
        OSError: the folder can't be written.
    """
    plain: Any = model if _is_plain(model) else strip(model)
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f'directory={str(directory)!r}: is a file; name a folder')
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=directory.parent))
    try:
        timm.models.save_for_hf(plain, str(staging), model_args=model_args, safe_serialization=True)
        _correct_config(staging / 'config.json', plain, mean, std)
        _check_rebuild(staging, plain)
        if directory.exists():
            for name in ('model.safetensors', 'config.json'):
                os.replace(staging / name, directory / name)
        else:
            staging.chmod(0o777 & ~_umask())
            os.replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    revision: Optional[str] = None,
    token: Optional[str] = None,
    create_pr: bool = False,
    commit_message: str = 'Add model',
    license: Optional[str] = None,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    model_args: Optional[dict[str, Any]] = None,
) -> str:
    """Uploads the plain model with a model card; ``timm.create_model('hf-hub:REPO_ID', pretrained=True)`` loads it.

    Args:
        model: A wrapped model, or a plain timm model.
        repo_id: ``user/name``; created if need be.
        private: Whether a new repository is private.
        revision: Branch to push to, ``main`` by default.
        token: Hub token, by default the one that ``hf auth login`` stored.
        create_pr: Open a pull request instead.
        commit_message: Message of the commit.
        license: Licence for the model card, e.g. ``'apache-2.0'``.
        mean: As in :func:`save_pretrained`.
        std: As in :func:`save_pretrained`.
        model_args: As in :func:`save_pretrained`.

    Returns:
        URL of the commit or pull request.

    Raises:
        ValueError: as :func:`save_pretrained`.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; nothing of a failed commit is visible there.
    """
    from huggingface_hub import HfApi  # only here: it is slow to import

    with tempfile.TemporaryDirectory() as tmp:
        folder = save_pretrained(model, Path(tmp) / 'export', mean=mean, std=std, model_args=model_args)
        (folder / 'README.md').write_text(model_card(model, repo_id, license=license), encoding='utf-8')
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr, commit_message=commit_message
        )
    return str(commit.pr_url or commit.commit_url)


def model_card(model: nn.Module, repo_id: str, license: Optional[str] = None) -> str:
    """Text of the model card: method, options, how to load.

    Args:
        model: A wrapped model, whose options are stated, or a plain timm model.
        repo_id: ``user/name``, as the usage example names it.
        license: Licence of the weights, e.g. ``'apache-2.0'``.
    """
    plain: Any = model if _is_plain(model) else strip(model)
    name = plain.pretrained_cfg['architecture']
    options = next((m.config.describe() for m in model.modules() if isinstance(m, MTE)), None)
    trained = f'Auxiliary tokens in training: {options}.\n' if options else ''
    task = 'image-classification' if getattr(plain, 'num_classes', 0) else 'image-feature-extraction'
    licence = f'license: {license}\n' if license else ''
    size = ', '.join(map(str, input_size(plain)))
    return f"""---
tags:
- {task}
- timm
- mte
library_name: timm
pipeline_tag: {task}
{licence}---
# {repo_id}

A `{name}` of timm, trained with Multi-Token Enhancing (MTE): during training the model carried auxiliary
tokens whose ensemble taught it; they are removed here without loss, and the model is plain timm.

{trained}
## Usage

```python
import timm, torch

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
output = model(torch.randn(1, {size}))  # or transform(image)[None]
```

## Citation

```bibtex
@article{{mte2024,
  title={{Multi-Token Enhancing for Vision Representation Learning}},
  journal={{arXiv preprint arXiv:2411.15787}},
  year={{2024}}
}}
```
"""


def _is_plain(model: nn.Module) -> bool:
    return (
        isinstance(model, nn.Module)
        and not any(isinstance(m, MTE) for m in model.modules())
        and hasattr(model, 'pretrained_cfg')
    )


def _correct_config(
    path: Path,
    model: Any,
    mean: Optional[Sequence[float]],
    std: Optional[Sequence[float]],
) -> None:
    """Makes pretrained_cfg true of the weights in this export."""
    config = json.loads(path.read_text(encoding='utf-8'))
    cfg = {k: v for k, v in config['pretrained_cfg'].items() if k not in _OF_OTHER_WEIGHTS}
    cfg['tag'] = 'mte'
    stem = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), cfg['input_size'][0])
    channels = getattr(model, 'in_chans', stem)  # not all models of older timm say it
    for name, values in (('mean', mean), ('std', std)):
        if values is not None:
            if len(values) != channels:
                raise ValueError(f'{name}={tuple(values)}: the model takes {channels} channels, give a value for each')
            cfg[name] = [float(v) for v in values]
    config['pretrained_cfg'] = cfg
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def _check_rebuild(folder: Path, model: nn.Module) -> None:
    """Holds timm to rebuilding the same model from ``folder``."""
    try:
        try:
            with torch.device('meta'):  # computes and stores nothing
                rebuilt = timm.create_model(f'local-dir:{folder}')
        except RuntimeError:  # models whose constructor reads a tensor, all of them in older timm
            rebuilt = timm.create_model(f'local-dir:{folder}')
    except Exception as e:
        raise ValueError(
            f'model: timm cannot rebuild it from its config ({type(e).__name__}: {e}); '
            'pass model_args=, the arguments that it was created with'
        ) from e
    ours, theirs = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (model, rebuilt))
    if ours != theirs:
        k = next(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
        raise ValueError(
            f'model: timm would rebuild it differently: {k} is {ours.get(k)} here and {theirs.get(k)} there; '
            'pass model_args=, the arguments that it was created with, e.g. model_args=dict(img_size=96)'
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
