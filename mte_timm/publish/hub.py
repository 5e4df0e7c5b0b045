"""The Hugging Face Hub: an export with its model card, as one commit.

Owns the upload and what the card says. Knows nothing of how an export is made.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

from torch import nn

from ..auxiliaries import MTEConfig
from ..backbones import input_size
from ..model import MTE
from .checkpoints import StripReport
from .export import check_export, plain_model, save_pretrained, unwrapped

__all__ = ['model_card', 'named', 'push_to_hub']


def push_to_hub(
    model: Union[nn.Module, StripReport, str, Path],
    repo_id: str,
    *,
    private: Optional[bool] = None,
    revision: Optional[str] = None,
    token: Optional[str] = None,
    create_pr: bool = False,
    commit_message: str = 'Add model',
    license: Optional[str] = None,
    img_size: Union[int, tuple[int, int], None] = None,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    model_args: Optional[dict[str, Any]] = None,
) -> str:
    """Uploads the plain model with a model card; ``timm.create_model('hf-hub:REPO_ID', pretrained=True)`` loads it.

    Args:
        model: A wrapped model, a plain timm model, what :func:`strip_checkpoint` returned, or the folder of an export,
            whose ``README.md`` is taken as the model card if it has one.
        repo_id: ``user/name``; created if need be.
        private: Whether a new repository is private; by default what its owner has set on the Hub.
        revision: Branch to push to, made of ``main`` if need be; ``main`` by default.
        token: Hub token, by default the one that ``hf auth login`` stored.
        create_pr: Open a pull request instead.
        commit_message: Message of the commit.
        license: Licence for the model card, e.g. ``'apache-2.0'``; not with a folder that has a ``README.md``.
        img_size: As in :func:`save_pretrained`; not with a folder, which has it.
        mean: Likewise.
        std: Likewise.
        model_args: Likewise.

    The three files are one commit: after a failure or an interruption the repository is as it was, or new and
    empty, and the same call can be made again. What had been uploaded by then is not uploaded twice. The export of a
    model that could not be uploaded is kept, with a warning that says where.

    Returns:
        URL of the commit or pull request.

    Raises:
        ValueError: as :func:`save_pretrained`, a folder that timm can't load, or ``private=True`` for a repository that
            is public.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
        ConnectionError: it can't be reached, or the connection broke.
    """
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id):
        raise ValueError(f'repo_id={repo_id!r}: must be user/name')
    from huggingface_hub.utils import validate_repo_id  # only here: it is slow to import

    validate_repo_id(repo_id)
    options = {'img_size': img_size, 'mean': mean, 'std': std, 'model_args': model_args}
    of_commit = {'revision': revision, 'create_pr': create_pr, 'commit_message': commit_message}
    if isinstance(model, (str, os.PathLike)):
        if given := [name for name, value in options.items() if value is not None]:
            raise ValueError(f'{given[0]}: an export has it already; pass it to save_pretrained')
        if license is not None and Path(model, 'README.md').exists():
            raise ValueError(f'license: {model} has a README.md, which is the model card; say it there')
        check_export(Path(model))
        return _upload(Path(model), repo_id, private, token, license, **of_commit)
    made = Path(tempfile.mkdtemp(prefix='mte-timm-'))
    folder = made / 'export'
    try:
        save_pretrained(model, folder, **options)  # type: ignore[arg-type]
        url = _upload(folder, repo_id, private, token, license, **of_commit)
    except BaseException:
        if folder.exists():
            words = ['mte-timm', 'push', str(folder), repo_id]
            words += ['--private' if private else '--no-private'] * (private is not None) + ['--pr'] * create_pr
            for option, value in (('revision', revision), ('license', license), ('message', commit_message)):
                words += [f'--{option}', value] if value is not None else []
            warnings.warn(
                f'nothing was uploaded; the export is kept in {folder}, and `{shlex.join(words)}` uploads it',
                stacklevel=2,
            )
        elif not any(made.iterdir()):  # where save_pretrained failed, trained weights are kept here
            made.rmdir()
        raise
    shutil.rmtree(made)
    return url


def named(repo_id: str, revision: Optional[str]) -> str:
    """A repository as timm's names have it, ``user/name`` or ``user/name@revision``."""
    return repo_id if revision in (None, 'main') else f'{repo_id}@{revision}'


def _upload(
    folder: Path,
    repo_id: str,
    private: Optional[bool],
    token: Optional[str],
    license: Optional[str],
    **of_commit: Any,
) -> str:
    """The three files of an export as one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files: dict[str, Any] = {name: folder / name for name in ('config.json', 'model.safetensors', 'README.md')}
    if not files['README.md'].exists():
        branch = None if of_commit['create_pr'] else of_commit['revision']  # what it will be merged into
        files['README.md'] = _card(_config(folder), named(repo_id, branch), license).encode()
    operations = [CommitOperationAdd(name, file) for name, file in files.items()]
    api, revision = HfApi(token=token), of_commit['revision']
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f'private=True: {repo_id} exists and is public; change that in its settings, or push without private'
            )
        # a pull request is against a branch that is there, and refs/pr/1 is there as long as the request is
        if revision is not None and not of_commit['create_pr'] and not revision.startswith('refs/'):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # whole or not at all; upload_folder may make several
        commit = api.create_commit(repo_id, operations, **of_commit)
    except (OSError, ValueError):
        raise
    except Exception as e:  # of the HTTP library in use, which changes with huggingface_hub's version
        if isinstance(e.__cause__, OSError):  # the Hub refused a file
            raise e.__cause__ from e
        raise ConnectionError(
            f'{repo_id}: the upload failed ({type(e).__name__}: {e}); nothing was committed, so the same call can '
            'be made again'
        ) from e
    return str(commit.pr_url or commit.commit_url)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    return config


def model_card(
    model: nn.Module,
    repo_id: str,
    license: Optional[str] = None,
    img_size: Optional[tuple[int, int]] = None,
) -> str:
    """Text of the model card: method, options, how to load.

    Args:
        model: A wrapped model, whose options are stated, or a plain timm model.
        repo_id: ``user/name``, as the usage example names it.
        license: Licence of the weights, e.g. ``'apache-2.0'``.
        img_size: Size (H, W) of the images in the usage example, by default the model's.
    """
    plain, inner = plain_model(model), unwrapped(model)
    config = {
        'architecture': plain.pretrained_cfg['architecture'],
        'num_classes': getattr(plain, 'num_classes', 0),
        'pretrained_cfg': {'input_size': [input_size(plain)[0], *(img_size or input_size(plain)[1:])]},
    }
    if isinstance(inner, MTE):
        config['mte'] = dataclasses.asdict(inner.config)
    return _card(config, repo_id, license)


def _card(config: dict[str, Any], repo_id: str, license: Optional[str]) -> str:
    """The model card of an export with this ``config.json``."""
    name, trained_with = config['architecture'], config.get('mte')
    task = 'image-classification' if config.get('num_classes') else 'image-feature-extraction'
    tags = f'- {task}\n- timm' + ('\n- mte' if trained_with else '')
    licence = f'license: {license}\n' if license else ''
    about = f'A `{name}` of timm.'
    if trained_with:
        about = _OF_MTE.format(name=name, options=MTEConfig.known(trained_with).describe())
    shape = ', '.join(map(str, config['pretrained_cfg']['input_size']))
    return f"""---
tags:
{tags}
library_name: timm
pipeline_tag: {task}
{licence}---
# {repo_id.partition('@')[0]}

{about}

## Usage

```python
import timm, torch

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
output = model(torch.randn(1, {shape}))  # or transform(image)[None]
```

{_CITATION if trained_with else ''}"""


_OF_MTE = """A `{name}` of timm, trained with Multi-Token Enhancing (MTE): during training the model carried auxiliary
tokens whose ensemble taught it; they are removed here without loss, and the model is plain timm.

Auxiliary tokens in training: {options}."""
_CITATION = """
## Citation

```bibtex
@article{mte2024,
  author={Li, Zhong-Yu and Hu, Yu-Song and Yin, Bo-Wen and Cheng, Ming-Ming},
  title={Multi-Token Enhancing for Vision Representation Learning},
  journal={arXiv preprint arXiv:2411.15787},
  year={2024}
}
```
"""
