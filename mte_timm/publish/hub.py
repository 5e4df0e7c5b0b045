"""The Hugging Face Hub: an export with its model card, as one commit.

Owns the upload and what the card says. Knows nothing of how an export is made.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

from torch import nn

from ..auxiliary import MTEConfig
from ..model import MTE
from ..utils import input_size
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
    **export_options: Any,
) -> str:
    """Uploads the plain model with a model card; ``timm.create_model('hf-hub:REPO_ID', pretrained=True)`` loads it.

    The three files are one commit: after a failure the repository is as it was, or new and empty, and the same call can
    be made again. The export of a model that could not be uploaded is kept, and a warning says where.

    Args:
        model: A wrapped model, a plain timm model, what :func:`strip_checkpoint` returned, or the folder of an export,
            whose ``README.md`` is taken as the model card if it has one.
        repo_id: ``user/name``; created if need be.
        private: Whether a new repository is private; by default what its owner has set on the Hub.
        revision: Branch to push to, made of ``main`` if need be; ``main`` by default.
        token: Hub token, by default the one that ``hf auth login`` stored.
        create_pr: Open a pull request instead.
        commit_message: Message of the commit.
        license: License for the model card, e.g. ``'apache-2.0'``; not with a folder that has a ``README.md``.
        export_options: ``img_size``, ``mean``, ``std`` and ``model_args`` as in :func:`save_pretrained`; not with a
            folder, which has them.

    Returns:
        URL of the commit or pull request.

    Raises:
        ValueError: as :func:`save_pretrained`, a folder that timm can't load, or ``private=True`` for a public one.
        OSError: the Hub refused, it can't be reached, or the connection broke.
    """
    if '/' not in repo_id:
        raise ValueError(f'repo_id={repo_id!r}: must be user/name')
    from huggingface_hub import CommitOperationAdd, HfApi  # only here: it is slow to import

    with _as_folder(model, export_options) as folder:
        files: dict[str, Any] = {name: folder / name for name in ('config.json', 'model.safetensors', 'README.md')}
        if not files['README.md'].exists():
            config = json.loads(files['config.json'].read_text(encoding='utf-8'))
            files['README.md'] = _card(config, named(repo_id, revision, create_pr), license).encode()
        elif license is not None:
            raise ValueError(f'license: {folder} has a README.md, which is the model card; say it there')
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise ValueError(f'private=True: {repo_id} exists and is public; change that in its settings')
            if revision is not None and not create_pr and not revision.startswith('refs/'):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            added = [CommitOperationAdd(name, file) for name, file in files.items()]
            of_commit: dict[str, Any] = {'commit_message': commit_message, 'revision': revision, 'create_pr': create_pr}
            commit = api.create_commit(repo_id, added, **of_commit)  # not upload_folder, which may make several
        except (OSError, ValueError):
            raise
        except Exception as e:  # of the HTTP library, which depends on huggingface_hub's version
            raise ConnectionError(f'nothing was committed ({e.__cause__ or e}); make the same call again') from e
    return str(commit.pr_url or commit.commit_url)


@contextlib.contextmanager
def _as_folder(model: Any, export_options: dict[str, Any]) -> Iterator[Path]:
    """The folder of an export: the given one, or a temporary one that stays if the upload fails."""
    if isinstance(model, (str, os.PathLike)):
        if export_options:
            raise ValueError(f'{next(iter(export_options))}: an export has it already; pass it to save_pretrained')
        check_export(Path(model))
        yield Path(model)
        return
    folder = Path(tempfile.mkdtemp(prefix='mte-timm-'), 'export')
    try:
        yield save_pretrained(model, folder, **export_options)
    except BaseException:
        if folder.exists():
            warnings.warn(f'nothing was uploaded; the export is in {folder}', stacklevel=4)
        raise
    shutil.rmtree(folder.parent)


def named(repo_id: str, revision: Optional[str], create_pr: bool = False) -> str:
    """A repository as timm names it, ``user/name`` or ``user/name@revision``; pull requests go to the former."""
    return repo_id if create_pr or revision in (None, 'main') else f'{repo_id}@{revision}'


def model_card(model: nn.Module, repo_id: str, license: Optional[str] = None) -> str:
    """Text of the model card of a wrapped or plain timm model: method, options, how to load."""
    plain, inner = plain_model(model), unwrapped(model)
    config = {
        'architecture': plain.pretrained_cfg['architecture'],
        'num_classes': plain.num_classes,
        'pretrained_cfg': {'input_size': input_size(plain)},
        'mte': dataclasses.asdict(inner.config) if isinstance(inner, MTE) else None,
    }
    return _card(config, repo_id, license)


def _card(config: dict[str, Any], repo_id: str, license: Optional[str]) -> str:
    """The model card of an export with this ``config.json``."""
    name, options = config['architecture'], config.get('mte')
    task = 'image-classification' if config.get('num_classes') else 'image-feature-extraction'
    return _CARD.format(
        tags=f'- {task}\n- timm' + '\n- mte' * bool(options),
        task=task,
        license=f'license: {license}\n' if license else '',
        repository=repo_id.partition('@')[0],
        repo_id=repo_id,
        about=f'A `{name}` of timm' + (_OF_MTE.format(MTEConfig.known(options).describe()) if options else '.'),
        shape=', '.join(map(str, config['pretrained_cfg']['input_size'])),
    )


_CARD = """---
tags:
{tags}
library_name: timm
pipeline_tag: {task}
{license}---
# {repository}

{about}

```python
import timm, torch

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
output = model(torch.randn(1, {shape}))  # or transform(image)[None]
```
"""
_OF_MTE = """, trained with Multi-Token Enhancing ([arXiv 2411.15787](https://arxiv.org/abs/2411.15787)).
During training the model carried auxiliary tokens whose ensemble taught it: {}.
They are removed here without loss, and the model is plain timm."""
