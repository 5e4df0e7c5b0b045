"""Repeats the paper's experiments and writes what came out.

    python -m benchmarks.study                      # all, on the sample of Fashion-MNIST: many hours on two cores
    python -m benchmarks.study --only "Tab. 5"      # one table
    python -m benchmarks.study --smoke              # the whole path in three minutes
    python -m benchmarks.study --data torchvision:CIFAR10:FOLDER --size 32
    torchrun --nproc_per_node=8 -m benchmarks.study --data FOLDER --model vit_small_patch16_224 --epochs 100

A killed study goes on where it stopped: a run that is finished has its file in --output, one that is not its checkpoint
in --checkpoints.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist

from benchmarks.study.data import Images, open_images
from benchmarks.study.evaluate import accuracies, features, patch_accuracies, raw_pixels
from benchmarks.study.plan import EXPERIMENTS, runs_of
from benchmarks.study.train import Run, make_backbone, train
from mte_timm.analysis import knn_accuracy

RESULTS = Path(__file__).parents[1] / 'results' / 'study'


def measure(run: Run, images: Images, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates; the checkpoint goes when the result is there."""
    method, state = train(run, images, args.checkpoints, args.workers, args.device)
    network = method.evaluated
    result: dict[str, Any] = {
        'run': run._asdict(),
        'images': images._asdict(),
        'seconds': state['seconds'],
        'steps': state['step'],
        'losses': mean_of_tenths(state['losses']),
        'accuracy': accuracies(network, images, args.device, linear=not args.smoke),
    }
    if hasattr(network.backbone, 'blocks') and not args.smoke:
        result['accuracy']['patches'] = patch_accuracies(network.backbone, images, (5, 10, 20), args.device)
    if method.classifies:
        result['accuracy']['top1'] = top1(method.backbone, images, args.device)
    return result


def top1(backbone: Any, images: Images, device: str) -> float:
    """Percent right of the model's own classifier."""
    logits, labels = features(backbone, images, 'test', device)
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def mean_of_tenths(losses: list[float]) -> list[float]:
    size = max(1, len(losses) // 10)
    return [sum(part) / len(part) for i in range(0, len(losses), size) if (part := losses[i : i + size])]


def references(images: Images, seeds: int) -> dict[str, Any]:
    """What a run has to beat: pixels, and networks that were not trained."""
    untrained = []
    for seed in range(seeds):
        backbone = make_backbone(Run('dino', None, seed=seed), images)
        untrained.append(knn_accuracy(*(features(backbone, images, which) for which in ('train', 'test'))))
    return {'raw pixels': raw_pixels(images), 'untrained': untrained}


def write(result: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(result, indent=1) + '\n')
    temporary.replace(path)


def main(argv: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=[e.name for e in EXPERIMENTS], metavar='TABLE')
    parser.add_argument('--method', nargs='+', help='only runs of these methods')
    parser.add_argument('--data', default='sample', help='sample, torchvision:CLASS:ROOT, or a folder with train, val')
    parser.add_argument('--size', type=int, help='side of the images')
    parser.add_argument('--limit', type=int, nargs=2, default=(None, None), metavar=('TRAIN', 'TEST'))
    parser.add_argument('--model', help='of timm, for all methods')
    parser.add_argument('--epochs', type=int, help='of all methods')
    parser.add_argument('--seeds', type=int, help='of all experiments')
    parser.add_argument('--workers', type=int, default=0, help='processes that read images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=RESULTS)
    parser.add_argument('--checkpoints', type=Path, default=Path('study_checkpoints'))
    parser.add_argument('--smoke', action='store_true', help='each method once, on few images, for one epoch')
    args = parser.parse_args(argv)
    if 'LOCAL_RANK' in os.environ:
        dist.init_process_group()
        if args.device == 'cuda':
            args.device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(args.device)
    first = not dist.is_initialized() or dist.get_rank() == 0
    changes: dict[str, Any] = {k: v for k, v in (('model', args.model), ('epochs', args.epochs)) if v}
    if args.smoke:
        args.limit, args.seeds = (256, 128), 1
        changes = {'epochs': 1, 'batch_size': 32, **changes}
    try:
        images = open_images(args.data, args.size, tuple(args.limit))
        images.split('train', None)
    except ValueError as e:
        parser.error(str(e))
    folder = args.output / images.name
    experiments = [e for e in EXPERIMENTS if not args.only or e.name in args.only]
    runs = [
        run
        for e in experiments
        for run in runs_of(e._replace(seeds=args.seeds or e.seeds), **changes)
        if not args.method or run.method in args.method
    ]
    began = time.time()
    if first and not (folder / 'references.json').exists():
        write({'torch': torch.__version__, 'timm': timm.__version__, **references(images, 1 if args.smoke else 3)},
              folder / 'references.json')  # fmt: skip
    for i, run in enumerate(runs):
        path = folder / f'{run.name}.json'
        if path.exists():
            if json.loads(path.read_text())['run'] != json.loads(json.dumps(run._asdict())):
                sys.exit(f'error: {path} is of other settings; remove it, or choose another --output')
            continue
        result = measure(run, images, args)
        if first:
            write(result, path)
            (args.checkpoints / f'{run.name}.pt').unlink(missing_ok=True)
            accuracy = {k: round(v, 1) for k, v in result['accuracy'].items() if isinstance(v, float)}
            print(f'{i + 1}/{len(runs)} {run.name}: {accuracy}, {result["seconds"]:.0f} s', flush=True)
    if first:
        print(f'{len(runs)} runs, {time.time() - began:.0f} s; results in {folder}')


if __name__ == '__main__':
    main()
