"""Publishing: the plain timm model out of a wrapped one, to a folder or to the Hugging Face Hub.

Owns what an export says of itself and that it is whole. Knows nothing of training.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import safetensors.torch
import timm
import torch
from torch import nn

from .backbones import evaluating, input_size
from .model import MTE, MTEConfig

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
    'label_offset',
    'test_input_size',
    'test_crop_pct',
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
    inner = _unwrapped(model)
    if not isinstance(inner, MTE):
        raise TypeError(f'model: a {type(model).__name__} holds no wrapped model; pass what mte.wrap returned')
    return inner.backbone


def save_pretrained(
    model: nn.Module,
    directory: Union[str, Path],
    *,
    img_size: Union[int, tuple[int, int], None] = None,
    mean: Optional[Sequence[float]] = None,
    std: Optional[Sequence[float]] = None,
    model_args: Optional[dict[str, Any]] = None,
) -> Path:
    """Writes the plain model so that ``timm.create_model('local-dir:DIRECTORY', pretrained=True)`` loads it.

    >>> import tempfile, timm, mte_timm as mte
    >>> model = mte.wrap('test_vit', num_classes=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plain = timm.create_model(f'local-dir:{mte.save_pretrained(model, folder)}', pretrained=True)

    Two files, ``model.safetensors`` and ``config.json``. They are written and checked under another name, the check
    being that timm rebuilds a model from them with the same weights and the same features, and then moved into
    place; a save that fails leaves what was there before. A process that is killed leaves the former export or the
    new one, or, at the instant when the config changes, weights without a config, which timm refuses; never
    weights with another model's config. Several processes may save to one folder: the last one's export stays.

    Args:
        model: A wrapped model, or a plain timm model.
        directory: Folder, made if need be. An export that is there already is replaced.
        img_size: Size of the images, N or (H, W), for models that take any: what their users should feed. By
            default what the model was made for.
        mean: Mean of the images' channels that training normalised with, where it is not the architecture's.
        std: Their standard deviation.
        model_args: Arguments of ``timm.create_model`` that the model was made with. timm 1.0.31 and newer
            remember them.

    Returns:
        The folder.

    Raises:
        TypeError: ``model`` is no model of timm's factory.
        ValueError: timm would not rebuild this model from what is known of it, or a bad argument.
        OSError: the folder can't be written.
    """
    plain = _plain(model)
    facts = _facts(plain, img_size, mean, std)
    inner = _unwrapped(model)
    options = dataclasses.asdict(inner.config) if isinstance(inner, MTE) else None
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f'directory={str(directory)!r}: is a file; name a folder')
    made = [p for p in (directory, *directory.parents) if not p.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _staging(directory) as staging:
            _write(plain, staging, model_args)
            _correct_config(staging / 'config.json', facts, options)
            _check_rebuild(staging, plain)
            _move(staging, directory)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return directory


def push_to_hub(
    model: Union[nn.Module, str, Path],
    repo_id: str,
    *,
    private: bool = False,
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
        model: A wrapped model, a plain timm model, or the folder of an export, whose ``README.md`` is taken as the
            model card if it has one.
        repo_id: ``user/name``; created if need be.
        private: Whether a new repository is private.
        revision: Branch to push to, made of ``main`` if need be; ``main`` by default.
        token: Hub token, by default the one that ``hf auth login`` stored.
        create_pr: Open a pull request instead.
        commit_message: Message of the commit.
        license: Licence for the model card, e.g. ``'apache-2.0'``.
        img_size: As in :func:`save_pretrained`; not with a folder, which has it.
        mean: Likewise.
        std: Likewise.
        model_args: Likewise.

    The three files are one commit: after a failure or an interruption the repository is as it was, or new and
    empty, and the same call can be made again. What had been uploaded by then is not uploaded twice.

    Returns:
        URL of the commit or pull request.

    Raises:
        ValueError: as :func:`save_pretrained`, or a folder that timm can't load.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused.
        ConnectionError: it can't be reached, or the connection broke.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # only here: it is slow to import

    options = {'img_size': img_size, 'mean': mean, 'std': std, 'model_args': model_args}
    with tempfile.TemporaryDirectory() as tmp:
        if isinstance(model, nn.Module):
            folder = save_pretrained(model, Path(tmp) / 'export', **options)  # type: ignore[arg-type]
        else:
            folder = Path(model)
            if given := [name for name, value in options.items() if value is not None]:
                raise ValueError(f'{given[0]}: an export has it already; pass it to save_pretrained')
            _check_export(folder)
        files: dict[str, Any] = {name: folder / name for name in ('config.json', 'model.safetensors', 'README.md')}
        if not files['README.md'].exists():
            config = json.loads(files['config.json'].read_text(encoding='utf-8'))
            files['README.md'] = _card(config, repo_id, license).encode()
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(  # one, whole or not at all; upload_folder may make several
                repo_id,
                [CommitOperationAdd(name, file) for name, file in files.items()],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
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
    plain, inner = _plain(model), _unwrapped(model)
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
        about = _OF_MTE.format(name=name, options=MTEConfig(**trained_with).describe())
    shape = ', '.join(map(str, config['pretrained_cfg']['input_size']))
    return f"""---
tags:
{tags}
library_name: timm
pipeline_tag: {task}
{licence}---
# {repo_id}

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
  title={Multi-Token Enhancing for Vision Representation Learning},
  journal={arXiv preprint arXiv:2411.15787},
  year={2024}
}
```
"""


def _unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, torch.compile's module, timm's ModelEma."""
    while not isinstance(model, MTE):
        inner = [getattr(model, name, None) for name in ('module', '_orig_mod', 'ema')]
        model, outer = next((m for m in inner if isinstance(m, nn.Module)), model), model
        if model is outer:
            break
    return model


def _plain(model: Any) -> Any:
    """The plain timm model in ``model``, wrapped or not."""
    inner = _unwrapped(model)
    plain = inner.backbone if isinstance(inner, MTE) else inner
    if not isinstance(plain, nn.Module) or 'architecture' not in (getattr(plain, 'pretrained_cfg', None) or {}):
        raise TypeError(
            f'model: a {type(plain).__name__} was not made by timm.create_model, which alone can make it again; '
            'pass what mte.wrap returned, or a model of timm.create_model'
        )
    return plain


def _facts(
    model: Any,
    img_size: Union[int, tuple[int, int], None],
    mean: Optional[Sequence[float]],
    std: Optional[Sequence[float]],
) -> dict[str, Any]:
    """What pretrained_cfg must say to be true of this model, checked."""
    channels, *size = input_size(model)
    if img_size is not None:
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f'img_size={img_size!r}: must be an integer or (height, width)')
    facts: dict[str, Any] = {'input_size': [channels, *size], 'num_classes': model.num_classes, 'custom_load': False}
    for name, values in (('mean', mean), ('std', std)):
        if values is None:
            continue
        if len(values) != channels or not all(math.isfinite(v) for v in values):
            raise ValueError(f'{name}={tuple(values)}: must be one number for each of the {channels} channels')
        if name == 'std' and min(values) <= 0:
            raise ValueError(f'std={tuple(values)}: must be above 0')
        facts[name] = [float(v) for v in values]
    return facts


def _write(model: Any, folder: Path, model_args: Optional[dict[str, Any]]) -> None:
    try:
        timm.models.save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    except safetensors.SafetensorError as e:
        raise OSError(f'directory={str(folder.parent)!r}: the weights could not be written ({e})') from e
    except RuntimeError as e:
        if 'share memory' not in str(e):
            raise
        raise ValueError(
            f'model: {model.pretrained_cfg["architecture"]} has parameters that stand in two places, which timm cannot '
            'save as safetensors; torch.save(mte.strip(model).state_dict(), ...) can'
        ) from e


def _correct_config(path: Path, facts: dict[str, Any], options: Optional[dict[str, Any]]) -> None:
    """Makes the config true of the weights in this export, and of how they were trained."""
    config = json.loads(path.read_text(encoding='utf-8'))
    cfg = {k: v for k, v in config['pretrained_cfg'].items() if k not in _OF_OTHER_WEIGHTS}
    if cfg.get('input_size') != facts['input_size']:
        cfg.pop('pool_size', None)
    for name in ('mean', 'std'):
        values, channels = cfg.get(name), facts['input_size'][0]
        if values and len(values) != channels:
            cfg[name] = [sum(values) / len(values)] * channels
    if options is not None:
        cfg['tag'] = 'mte'
        config['mte'] = options
    config['pretrained_cfg'] = cfg | facts
    config['sha256'] = _digest(path.with_name('model.safetensors'))
    config.get('model_args', {}).pop('num_classes', None)  # told above; transformers takes it once only
    config['num_classes'] = facts['num_classes']
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def _check_export(folder: Path) -> None:
    """Holds timm to loading the export in ``folder``."""
    missing = [name for name in ('config.json', 'model.safetensors') if not (folder / name).is_file()]
    if missing:
        raise ValueError(f'model={str(folder)!r}: has no {missing[0]}; name the folder that save_pretrained wrote')
    try:
        timm.create_model(f'local-dir:{folder}', pretrained=True)
        expected = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('sha256')
    except Exception as e:
        raise ValueError(f'model={str(folder)!r}: timm cannot load it ({type(e).__name__}: {e})') from e
    if expected not in (None, _digest(folder / 'model.safetensors')):
        raise ValueError(
            f'model={str(folder)!r}: its weights are not those that were saved with its config; export them again'
        )


def _check_rebuild(folder: Path, model: Any) -> None:
    """Holds timm to rebuilding the same model from ``folder``: the same weights, the same features."""
    advice = 'pass model_args=, the arguments that it was created with, e.g. model_args=dict(img_size=96)'
    try:
        rebuilt: Any = timm.create_model(f'local-dir:{folder}')
    except Exception as e:
        raise ValueError(f'model: timm cannot rebuild it from its config ({type(e).__name__}: {e}); {advice}') from e
    state = safetensors.torch.load_file(folder / 'model.safetensors')
    theirs = {k: v.shape for k, v in rebuilt.state_dict().items()}
    wrong = [k for k in {**state, **theirs} if k not in state or state[k].shape != theirs.get(k)]
    if wrong:
        ours = tuple(state[wrong[0]].shape) if wrong[0] in state else None
        raise ValueError(
            f'model: timm would rebuild it differently: {wrong[0]} is {ours} here and '
            f'{tuple(theirs.get(wrong[0], ())) or None} there; {advice}'
        )
    rebuilt.load_state_dict(state)
    like = next(model.parameters())
    rebuilt.to(like.device, like.dtype).eval()
    x = torch.linspace(-1, 1, math.prod(input_size(model))).view(1, *input_size(model)).to(like.device, like.dtype)
    with torch.no_grad(), evaluating(model):
        same = torch.allclose(model(x), rebuilt(x), rtol=1e-3, atol=1e-3)
    if not same:
        raise ValueError(f'model: timm would rebuild it with the same weights but other features; {advice}')


def _digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A folder in ``directory``, which is sure to be on the same filesystem; those of killed processes are removed."""
    for left in directory.glob('.mte-*'):
        with contextlib.suppress(OSError), _locked(left, wait=False) as ours:
            if ours and time.time() - left.stat().st_mtime > 60:  # a younger one may be about to be locked
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix='.mte-', dir=directory) as tmp, _locked(Path(tmp)):
        yield Path(tmp)


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of ``folder`` as long as the process lives; whether it was had."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # no such locks here, or the folder is gone
        yield wait
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        ours = True
    except OSError:
        ours = wait  # a filesystem without locks
    try:
        yield ours
    finally:
        os.close(descriptor)


def _move(source: Path, target: Path) -> None:
    """Moves an export into ``target`` over what is there; all, or on an error nothing."""
    weights, config = (target / name for name in ('model.safetensors', 'config.json'))
    new_weights, new_config = source / weights.name, source / config.name
    for path in (new_weights, new_config):
        with path.open('rb') as file:
            os.fsync(file.fileno())
    with _locked(target):
        previous = source / 'previous'
        previous.mkdir()
        for path in (weights, config):
            if path.exists():
                try:
                    os.link(path, previous / path.name)
                except OSError:  # a filesystem without links
                    shutil.copy2(path, previous / path.name)
        try:
            # at no time weights beside a config that is not theirs
            if config.exists() and config.read_bytes() != new_config.read_bytes():
                config.unlink()
            os.replace(new_weights, weights)
            os.replace(new_config, config)
        except BaseException:
            config.unlink(missing_ok=True)
            for path in (weights, config):
                if (previous / path.name).exists():
                    os.replace(previous / path.name, path)
                else:
                    path.unlink(missing_ok=True)
            raise
