"""The command ``mte-timm``."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Optional

from .publish.checkpoints import StripReport, strip_checkpoint
from .publish.export import save_pretrained
from .publish.hub import named, push_to_hub
from .publish.loading import CheckpointError
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
    strip.add_argument('checkpoint', metavar='CKPT', help='file of torch.save, or safetensors')
    strip.add_argument('--model', required=True, metavar='NAME', help='timm architecture, e.g. vit_small_patch16_224')
    strip.add_argument(
        '--key', help='state dict or name prefix to take: teacher, student.backbone, momentum_encoder, ...'
    )
    strip.add_argument('-o', '--output', required=True, metavar='DIR', help='folder to write')
    strip.add_argument(
        '--img-size', type=int, nargs='+', metavar='N', help='input size, N or H W; default: that of training'
    )
    strip.add_argument(
        '--trained-size', type=int, nargs='+', metavar='N', help='size of the images in training, N or H W'
    )
    strip.add_argument(
        '--drop', nargs='+', default=[], metavar='NAME', help='tensors whose names begin so are no part of the backbone'
    )
    strip.add_argument('--in-chans', type=int, metavar='N', help='channels of the images')
    strip.add_argument('--num-classes', type=int, default=0, metavar='N', help='keep a classifier of N classes')
    strip.add_argument('--mean', type=float, nargs='+', metavar='X', help='mean that training normalised with')
    strip.add_argument('--std', type=float, nargs='+', metavar='X', help='standard deviation likewise')
    strip.add_argument(
        '--model-kwargs',
        nargs='*',
        default=[],
        type=_assignment,
        metavar='KEY=VALUE',
        help='more arguments of timm.create_model, e.g. embed_dim=96 depth=4',
    )
    strip.add_argument('--trust', action='store_true', help='load a file that runs code; only from people you trust')
    strip.set_defaults(run=_strip)


def _add_push(commands: Any) -> None:
    push = commands.add_parser(
        'push',
        help='upload an export to the Hugging Face Hub',
        description='Uploads a folder that `mte-timm strip` or mte.save_pretrained wrote, with a model card, in one '
        "commit; timm.create_model('hf-hub:USER/NAME', pretrained=True) loads it.",
    )
    push.add_argument('folder', metavar='DIR', help='folder of an export')
    push.add_argument('repo_id', metavar='USER/NAME', help='repository, made if need be')
    push.add_argument(
        '--private',
        action=argparse.BooleanOptionalAction,
        help="whether a new repository is private; default: the Hub's",
    )
    push.add_argument('--revision', metavar='BRANCH', help='branch to push to, made if need be; default: main')
    push.add_argument('--pr', action='store_true', help='open a pull request instead')
    push.add_argument('--license', metavar='NAME', help='for the model card, e.g. apache-2.0')
    push.add_argument('--message', default='Add model', metavar='TEXT', help='of the commit')
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
    create_kwargs = dict(args.model_kwargs)
    for name in ('num_classes', 'in_chans'):
        if name in create_kwargs:
            raise ValueError(f'--model-kwargs {name}=...: pass --{name.replace("_", "-")}')
    if args.in_chans is not None:
        create_kwargs['in_chans'] = args.in_chans
    create_kwargs['num_classes'] = args.num_classes
    size, trained = (_size(getattr(args, name), name) for name in ('img_size', 'trained_size'))
    report = _stripped(args, size, trained, create_kwargs)
    folder = save_pretrained(report, args.output, img_size=size, mean=args.mean, std=args.std)
    load = f"timm.create_model('local-dir:{folder}', pretrained=True)"
    return f'{report}\n{_normalization(report, args)}\nwrote {folder}; load it with {load}'


def _size(values: Optional[list[int]], name: str) -> Optional[tuple[int, int]]:
    if values is None:
        return None
    if len(values) > 2:
        raise ValueError(f'--{name.replace("_", "-")} {" ".join(map(str, values))}: takes N, or H W')
    return values[0], values[-1]


def _stripped(args: argparse.Namespace, size: Any, trained: Any, create_kwargs: dict[str, Any]) -> StripReport:
    """The backbone made for images of ``size``; models that take any size aren't told."""
    options = {'trained_size': trained, 'drop': args.drop, 'trust': args.trust}
    if size is not None and 'img_size' not in create_kwargs:
        sized = {**create_kwargs, 'img_size': size[0] if size[0] == size[1] else size}
        try:
            return strip_checkpoint(args.checkpoint, args.model, args.key, **options, **sized)
        except CheckpointError as e:
            if "unexpected keyword argument 'img_size'" not in str(e):
                raise
    return strip_checkpoint(args.checkpoint, args.model, args.key, **options, **create_kwargs)


def _normalization(report: StripReport, args: argparse.Namespace) -> str:
    """Whose mean and standard deviation the export has."""
    said = [f'--{name}' for name in ('mean', 'std') if getattr(args, name) is None]
    if not said:
        return 'mean and std: as given'
    known = report.mean is not None and report.std is not None
    whose = f'those of {report.codebase}' if known else "the architecture's default in timm, since the file names none"
    return f'{" and ".join(s[2:] for s in said)}: {whose}; {" and ".join(said)} change them'


def _assignment(text: str) -> tuple[str, object]:
    import ast

    key, sep, value = text.partition('=')
    if not sep or not key:
        raise argparse.ArgumentTypeError(f'{text!r}: write KEY=VALUE, e.g. embed_dim=96')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == '__main__':
    sys.exit(main())
