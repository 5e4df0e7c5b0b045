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
    args = parser.parse_args(argv)
    try:
        print(args.run(args))
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
    add('--drop', nargs='+', default=[], metavar='NAME', help='tensors whose names begin so are no part of it')
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
    add('--pr', action='store_true', help='open a pull request instead')
    add('--license', metavar='NAME', help='for the model card, e.g. apache-2.0')
    add('--message', default='Add model', metavar='TEXT', help='of the commit')
    push.set_defaults(run=_push)


def _push(args: argparse.Namespace) -> str:
    url = push_to_hub(
        args.folder,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        create_pr=args.pr,
        commit_message=args.message,
        license=args.license,
    )
    when = 'once it is merged, ' if args.pr else ''
    name = named(args.repo_id, None if args.pr else args.revision)
    return f"pushed: {url}\n{when}load it with timm.create_model('hf-hub:{name}', pretrained=True)"


def _strip(args: argparse.Namespace) -> str:
    for name in ('num_classes', 'in_chans'):
        if name in args.model_kwargs:
            raise ValueError(f'--model-kwargs {name}=...: pass --{name.replace("_", "-")}')
    given = {'num_classes': args.num_classes, 'in_chans': args.in_chans, 'img_size': _size(args.img_size)}
    kwargs = args.model_kwargs | {k: v for k, v in given.items() if v is not None}
    report = strip_checkpoint(
        args.checkpoint,
        args.model,
        args.key,
        trained_size=_size(args.trained_size),
        drop=args.drop,
        trust=args.trust,
        **kwargs,
    )
    folder = save_pretrained(report, args.output, mean=args.mean, std=args.std)
    load = f"timm.create_model('local-dir:{folder}', pretrained=True)"
    return f'{report}\n{_normalization(report, args)}\nwrote {folder}; load it with {load}'


def _size(values: Optional[list[int]]) -> Any:
    """N or (H, W), as it was written."""
    return values[0] if values and len(values) == 1 else values and tuple(values)


def _normalization(report: StripReport, args: argparse.Namespace) -> str:
    """Whose mean and standard deviation the export has."""
    said = [name for name in ('mean', 'std') if getattr(args, name) is None]
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
