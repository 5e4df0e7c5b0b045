"""The command ``mte-timm``."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Optional

import timm.utils

from .publish.checkpoints import StripReport, strip_checkpoint
from .publish.export import save_pretrained
from .publish.hub import named, push_to_hub
from .version import __version__

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command with ``argv``; returns its exit status, 1 for an error that it has printed."""
    parser = argparse.ArgumentParser('mte-timm', description='Multi-Token Enhancing for timm models.')
    parser.add_argument('--version', action='version', version=f'mte-timm {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    _add_strip(commands)
    _add_push(commands)
    args = vars(parser.parse_args(argv))
    try:
        print(args.pop('run')(**args))
    except (ValueError, OSError, TypeError) as e:
        print(f'mte-timm: error: {e}', file=sys.stderr)
        return 1
    return 0


def _add_strip(commands: Any) -> None:
    strip = commands.add_parser(
        'strip',
        help='turn a training checkpoint into a plain timm model',
        description='Finds the backbone in a training checkpoint (DINO, iBOT, MoCo v3, MoBY, lightly, timm, MTE) and '
        "writes it for timm.create_model('local-dir:DIR', pretrained=True).",
    )
    add = strip.add_argument
    add('checkpoint', metavar='CKPT', help='file of torch.save, or safetensors')
    add('--model', required=True, metavar='NAME', help='timm architecture, e.g. vit_small_patch16_224')
    add('--key', help='state dict or name prefix to take: teacher, student.backbone, momentum_encoder, ...')
    add('-o', '--output', required=True, metavar='DIR', help='folder to write')
    add('--img-size', type=int, nargs='+', metavar='N', help='input size, N or H W; default: that of training')
    add('--trained-size', type=int, nargs='+', metavar='N', help='size of the images in training, N or H W')
    add('--drop', nargs='+', default=[], metavar='NAME', help='leave out tensors whose names begin so')
    add('--in-chans', type=int, metavar='N', help='channels of the images')
    add('--num-classes', type=int, default=0, metavar='N', help='keep a classifier of N classes')
    add('--mean', type=float, nargs='+', metavar='X', help='mean that training normalized with')
    add('--std', type=float, nargs='+', metavar='X', help='standard deviation likewise')
    add(
        '--model-kwargs', nargs='*', default={}, type=_assignment, action=timm.utils.ParseKwargs, metavar='KEY=VALUE',
        help='more arguments of timm.create_model, e.g. embed_dim=96 depth=4',
    )  # fmt: skip
    add('--trust', action='store_true', help='load a file that runs code; only from people you trust')
    strip.set_defaults(run=_strip)


def _add_push(commands: Any) -> None:
    push = commands.add_parser(
        'push',
        help='upload an export to the Hugging Face Hub',
        description='Uploads a folder that `mte-timm strip` or mte.save_pretrained wrote, with a model card, in one '
        "commit; timm.create_model('hf-hub:USER/NAME', pretrained=True) loads it.",
    )
    add = push.add_argument
    add('folder', metavar='DIR', help='folder of an export')
    add('repo_id', metavar='USER/NAME', help='repository, made if need be')
    private = "whether a new repository is private; default: the Hub's"
    add('--private', action=argparse.BooleanOptionalAction, help=private)
    add('--revision', metavar='BRANCH', help='branch to push to, made if need be; default: main')
    add('--pr', dest='create_pr', action='store_true', help='open a pull request instead')
    add('--license', metavar='NAME', help='for the model card, e.g. apache-2.0')
    add('--message', dest='commit_message', default='Add model', metavar='TEXT', help='of the commit')
    push.set_defaults(run=_push)


def _push(folder: str, repo_id: str, **options: Any) -> str:
    url = push_to_hub(folder, repo_id, **options)
    when = 'once it is merged, ' if options['create_pr'] else ''
    name = named(repo_id, options['revision'], options['create_pr'])
    return f"pushed: {url}\n{when}load it with timm.create_model('hf-hub:{name}', pretrained=True)"


def _strip(checkpoint: str, model: str, output: str, mean: Any, std: Any, model_kwargs: Any, **options: Any) -> str:
    for name in ('num_classes', 'in_chans'):
        if name in model_kwargs:
            raise ValueError(f'--model-kwargs {name}=...: pass --{name.replace("_", "-")}')
    given = {name: value for name, value in options.items() if value is not None}
    report = strip_checkpoint(checkpoint, model, **model_kwargs, **given)
    folder = save_pretrained(report, output, mean=mean, std=std)
    load = f"timm.create_model('local-dir:{folder}', pretrained=True)"
    return f'{report}\n{_normalization(report, mean, std)}\nwrote {folder}; load it with {load}'


def _normalization(report: StripReport, mean: Any, std: Any) -> str:
    """Whose mean and standard deviation the export has."""
    said = [name for name, value in (('mean', mean), ('std', std)) if value is None]
    if not said:
        return 'mean and std: as given'
    known = report.mean is not None and report.std is not None
    whose = f'those of {report.codebase}' if known else "the architecture's default in timm, since the file names none"
    return f'{" and ".join(said)}: {whose}; {" and ".join(f"--{name}" for name in said)} change them'


def _assignment(text: str) -> str:
    if '=' not in text[1:]:
        raise argparse.ArgumentTypeError(f'{text!r}: write KEY=VALUE, e.g. embed_dim=96')
    return text


if __name__ == '__main__':
    sys.exit(main())
