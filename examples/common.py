"""What the scripts beside this file share: command line, images, one line for each epoch.

In each of them the calls of `mte` are MTE's: `wrap`, `make_teacher`, a loss, `save_pretrained`.
`pip install -e '.[examples]'` installs what they need.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.utils import ParseKwargs
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


class Result(NamedTuple):
    """What each ``main`` returns."""

    losses: list[float]  # mean of each epoch
    export: Path  # for timm.create_model(f'local-dir:{export}', pretrained=True)
    model: nn.Module  # the wrapped model that was exported
    criterion: nn.Module


def make_parser(doc: str, lr: float, model: str = 'vit_small_patch16_224') -> argparse.ArgumentParser:
    """The arguments that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, metavar='FOLDER', help='with a folder for each class')
    parser.add_argument('--model', default=model, help='name in timm (default: %(default)s)')
    parser.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='for timm.create_model'
    )
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument(
        '--epochs',
        type=int,
        default=100,
        help='(default: %(default)s) more of them than a run had make it longer: it goes on where it was with the '
        'learning rate that a run of the new length has there',
    )
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--lr', type=float, default=lr, help='for the default batch size (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=8, help='processes that read images')
    parser.add_argument('--out', type=Path, default=Path('output'), metavar='FOLDER', help='gets the model in export/')
    parser.add_argument('--seed', type=int, default=0)
    return parser


def create_model(args: argparse.Namespace, **kwargs: Any) -> nn.Module:
    """The timm model that the arguments name, for images of their size."""
    kwargs |= args.model_kwargs
    try:
        return timm.create_model(args.model, **{'img_size': args.img_size} | kwargs)
    except TypeError:  # convolutional networks have no img_size, they take any
        return timm.create_model(args.model, **kwargs)


def image_loader(args: argparse.Namespace, transform: Any) -> DataLoader:
    """Shuffled batches (views, labels) of the images in ``args.data``."""
    try:
        images = ImageFolder(args.data, transform)
    except OSError as e:
        sys.exit(f'error: --data {args.data}: must hold a folder of images for each class. {e}')
    require_batch(images, args)
    return DataLoader(
        images,
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        pin_memory=device.type == 'cuda',
    )


def require_batch(images: Any, args: argparse.Namespace) -> None:
    if len(images) < args.batch_size:
        sys.exit(f'error: --data {args.data}: {len(images)} images, fewer than --batch-size {args.batch_size}')


def mixed_precision() -> tuple[Any, torch.amp.GradScaler]:
    """A context for the forward pass and a scaler of gradients: bfloat16 or float16 on a GPU, on a CPU neither."""
    on_gpu = device.type == 'cuda'
    half = on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = partial(torch.autocast, device.type, torch.float16 if half else torch.bfloat16, enabled=on_gpu)
    return autocast, torch.amp.GradScaler(device.type, enabled=half)


def command_of(args: argparse.Namespace) -> dict[str, str]:
    """The arguments that make a run what it is; a run may be made longer, and go on elsewhere."""
    return {k: str(v) for k, v in vars(args).items() if k not in ('out', 'workers', 'epochs')}


def require_same_run(path: Path, saved: dict[str, str], epoch: int, args: argparse.Namespace) -> None:
    """Ends the script where ``path`` is of a run with another command, or of more epochs."""
    command = command_of(args)
    for name in [*saved, *command]:
        if saved.get(name) != command.get(name):
            sys.exit(f'error: {path} is of a run with another --{name.replace("_", "-")}; choose another --out')
    if epoch > args.epochs:
        sys.exit(f'error: {path} has {epoch} epochs; pass at least as many --epochs, or choose another --out')
    print(f'goes on after epoch {epoch}, from {path}', flush=True)


class Checkpoint:
    """A run after its last whole epoch, in ``checkpoint.pt`` of its ``--out``: the same command goes on from there.

    With ``--workers 0`` on the CPU to the bit. `mte-timm strip` reads the file.

    Args:
        args: Of the command. Another command is refused, since it would be another run.
        parts: All that changes in training, by the name that it gets in the file: modules, optimizer, `Progress`.
    """

    def __init__(self, args: argparse.Namespace, **parts: Any) -> None:
        self.path, self.args, self.parts, self.epoch = args.out / 'checkpoint.pt', args, parts, 0
        if not self.path.exists():
            return
        saved = torch.load(self.path, map_location=device, weights_only=True)
        if not {'command', *parts} <= saved.keys():
            sys.exit(f'error: {self.path} is of another script; choose another --out')
        self.epoch = saved['epoch']
        require_same_run(self.path, saved['command'], self.epoch, args)
        for name, part in parts.items():
            if saved[name]:  # a scaler of gradients that is off has none
                part.load_state_dict(saved[name])
            for buffer, value in saved['buffers'][name].items():
                owner, _, own = buffer.rpartition('.')
                setattr(part.get_submodule(owner), own, value)
        version, internal, gauss = saved['random']['python']
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = saved['random']['numpy']
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(saved['random']['torch'].cpu())
        if device.type == 'cuda':
            torch.cuda.set_rng_state(saved['random']['cuda'].cpu())

    def save(self) -> None:
        """To be called after each epoch."""
        self.epoch += 1
        kind, keys, *rest = np.random.get_state()
        generators = {
            'python': random.getstate(),
            'numpy': (kind, keys.tolist(), *rest),
            'torch': torch.get_rng_state(),
        }
        if device.type == 'cuda':
            generators['cuda'] = torch.cuda.get_rng_state()
        state = {
            'command': command_of(self.args),
            'epoch': self.epoch,
            **{name: part.state_dict() for name, part in self.parts.items()},
            'buffers': {name: self._transient(part) for name, part in self.parts.items()},
            'random': generators,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix('.tmp')
        torch.save(state, temporary)
        temporary.replace(self.path)

    @staticmethod
    def _transient(part: Any) -> dict[str, torch.Tensor]:
        """Buffers that are in no state dict, as lightly's memory bank."""
        if not isinstance(part, nn.Module):
            return {}
        kept = part.state_dict()
        return {k: v for k, v in part.named_buffers() if k not in kept}


class Progress:
    """Sums the losses of an epoch and prints a line at its end; on a terminal, a bar with the time left within it."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def state_dict(self) -> dict[str, list[float]]:
        return {'losses': self.losses, 'accuracies': self.accuracies}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.losses, self.accuracies = state['losses'], state['accuracies']

    def epoch(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The batches of an epoch."""
        self.total, self.steps, self.began = 0.0, 0, time.perf_counter()
        name = f'epoch {len(self.losses) + 1}/{self.epochs}'
        return tqdm(loader, name, leave=False, disable=None)  # None: where stderr is no terminal

    def add(self, loss: torch.Tensor) -> None:
        self.total += loss.detach().float()
        self.steps += 1

    def end_epoch(self, more: str = '') -> None:
        loss = float(self.total) / self.steps
        if not math.isfinite(loss):
            sys.exit(f'error: the loss is {loss}; try a lower --lr')
        self.losses.append(loss)
        seconds = time.perf_counter() - self.began
        print(f'epoch {len(self.losses)}/{self.epochs}: loss {loss:.4f}{more}, {seconds:.0f} s', flush=True)
