"""What a published backbone is worth on other data and tasks.

    python -m benchmarks.transfer knn      --weights EXPORT --data FOLDER                     # or linear
    python -m benchmarks.transfer finetune --weights EXPORT --data torchvision:CIFAR10:FOLDER
    python -m benchmarks.transfer segment  --weights EXPORT --data FOLDER [--frozen --head linear]
    python -m benchmarks.transfer detect   --weights EXPORT --data FOLDER

EXPORT is a folder of mte.save_pretrained, hf-hub:user/name, or a model of timm's; pixels, of knn and linear, is the
pictures themselves. Each run adds a line to --output and draws --picture. Classification takes what
torchvision.datasets has, or a folder with train and val; segmentation ADE20K, CamVid, or a folder with images/train,
masks/train, images/val and masks/val; detection COCO or Pascal VOC.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch

from benchmarks import records
from benchmarks.images import CACHE, open_images
from benchmarks.transfer.backbone import Maps, load
from benchmarks.transfer.training import Recipe

RESULTS = Path(__file__).parents[1] / 'results' / 'transfer.jsonl'
RECIPES = {
    'finetune': Recipe(epochs=5, batch_size=64, lr=1e-3),
    'segment': Recipe(epochs=20, batch_size=8, lr=1e-3),
    'detect': Recipe(epochs=10, batch_size=4, lr=1e-3),
}


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    size = (args.size * 2)[:2]
    line: dict[str, Any] = {
        'task': args.task,
        'weights': args.label,
        'fingerprint': fingerprint(args.weights),
        'data': args.data_name,
        'seed': args.seed,
        'size': size,
        'limit': args.limit,
        'recipe': args.recipe and args.recipe._asdict(),
    }
    if args.task in ('segment', 'detect'):
        line |= {'frozen': args.frozen, 'channels': args.channels}
    if args.task == 'segment':
        line |= {'head': args.head, 'void': args.void}
    done = records.read(args.output).get(args.name)
    if done is not None and line.items() <= done.items():
        print(f'{args.name}: is in {args.output} already')
        return
    if done is not None:
        differ = ', '.join(k for k, v in line.items() if done.get(k, line) != v)
        sys.exit(
            f'error: {args.name} is in {args.output} with another {differ}; choose another --output or folder name'
        )
    began = time.perf_counter()
    try:
        pixels = args.weights == 'pixels'
        model = torch.nn.Flatten() if pixels else load(args.weights, (size[0], size[1]), not args.untrained)
        result = run(args, model, (size[0], size[1]))
    except (ValueError, FloatingPointError, OSError) as e:
        sys.exit(f'error: {e}')
    made_by = {'torch': torch.__version__, 'timm': timm.__version__, 'threads': torch.get_num_threads()}
    seconds = round(time.perf_counter() - began, 1)
    records.put(args.output, args.name, {**line, 'result': result, 'seconds': seconds, 'made by': made_by})
    print(f'{args.name}: ' + ', '.join(f'{k} {v:.1f}' for k, v in result.items() if isinstance(v, float)))


def fingerprint(weights: str) -> str:
    """Of the weights in a folder; a name says itself what it names."""
    path = Path(weights, 'model.safetensors')
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else weights


def run(args: argparse.Namespace, model: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Trains and tests; each task brings its own libraries."""
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    common = {'device': args.device, 'workers': args.workers, 'name': args.name, 'picture': args.picture}
    if args.task in ('knn', 'linear', 'finetune'):
        from benchmarks.transfer import classify

        cfg = timm.data.resolve_model_data_config(model)
        images = open_images(args.data, size[0], (args.limit, None), cache=args.cache)
        images = images._replace(mean=tuple(cfg['mean']), std=tuple(cfg['std']))
        if args.task == 'finetune':
            return classify.finetune(model, images, args.recipe, **common)
        return classify.of_features(args.task, model, images, args.device, args.picture)
    if args.task == 'segment':
        from benchmarks.transfer.segment import open_masked, segment

        maps = Maps(model, size, frozen=args.frozen)
        data = open_masked(args.data, tuple(args.void))
        return segment(maps, data, size, args.head, args.channels, args.recipe, **common)
    from benchmarks.transfer.detect import detect, open_boxed

    maps = Maps(model, size, only_last=True, frozen=args.frozen)
    return detect(maps, open_boxed(args.data), size, args.channels, args.recipe, **common)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        'benchmarks.transfer', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('task', choices=('knn', 'linear', 'finetune', 'segment', 'detect'))
    add('--weights', required=True, metavar='EXPORT')
    add('--data', required=True, metavar='DATA')
    add('--size', type=int, nargs='+', default=[224], metavar='N', help='of pictures, N or H W; default: 224')
    add('--frozen', action='store_true', help='train only what stands on the backbone (segment, detect)')
    add('--untrained', action='store_true', help='start from new weights of the same architecture')
    add('--head', choices=('upernet', 'linear'), default='upernet', help='of segment')
    add('--channels', type=int, default=256, help='width of UPerNet and of the pyramid')
    add(
        '--void',
        type=int,
        nargs='+',
        default=[],
        metavar='V',
        help='values of masks that are no class; default: 255, of ADE20K 0, of CamVid 11',
    )
    add('--limit', type=int, metavar='N', help='most training images (knn, linear, finetune)')
    for name, kind in (('epochs', int), ('batch_size', int), ('lr', float), ('layer_decay', float)):
        of = ', '.join(f'{getattr(recipe, name):g} ({task})' for task, recipe in RECIPES.items())
        add(f'--{name.replace("_", "-")}', type=kind, metavar='N', help=f'default: {of}')
    add('--seed', type=int, default=0, help='of training; that of pre-training is in the name of the weights')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--threads', type=int, metavar='N')
    add('--workers', type=int, default=0, metavar='N', help='that read pictures')
    add('--output', type=Path, default=RESULTS, metavar='FILE', help='JSONL of results')
    add('--picture', type=Path, metavar='FILE', help='PNG of predictions; default: transfer_output/NAME.png')
    add('--cache', type=Path, default=CACHE, metavar='FOLDER', help='of decoded pictures (knn, linear)')
    args = parser.parse_args()
    if len(args.size) > 2 or (args.task in ('knn', 'linear', 'finetune') and len(set(args.size)) > 1):
        parser.error(f'--size: {args.task} takes N' + ' or H W' * (args.task in ('segment', 'detect')))
    if args.frozen and args.task not in ('segment', 'detect'):
        parser.error('--frozen: only for segment and detect; knn and linear train no backbone at all')
    if args.weights == 'pixels' and (args.untrained or args.task not in ('knn', 'linear')):
        parser.error('--weights: only for knn and linear, and without --untrained, can it be pixels')
    serve = {
        'limit': ('knn', 'linear', 'finetune'),
        'void': ('segment',),
        **dict.fromkeys(('epochs', 'batch_size', 'lr', 'layer_decay'), tuple(RECIPES)),
    }
    for name, tasks in serve.items():
        if getattr(args, name) not in (None, []) and args.task not in tasks:
            parser.error(f'--{name.replace("_", "-")}: only for {", ".join(tasks)}')
    if any(v < 0 for v in args.void):
        parser.error('--void: must be values of masks, 0 or above')
    args.recipe = RECIPES.get(args.task)
    if args.recipe:
        changes = {k: getattr(args, k) for k in args.recipe._fields if getattr(args, k, None) is not None}
        args.recipe = args.recipe._replace(**changes)
    args.label = Path(args.weights).name + '-untrained' * args.untrained
    args.data_name = (args.data.split(':')[1] if args.data.startswith('torchvision:') else Path(args.data).name).lower()
    how = [args.head] * (args.task == 'segment') + ['frozen'] * args.frozen
    args.name = '-'.join([args.task, *how, args.data_name, args.label] + [f'run{args.seed}'] * bool(args.seed))
    args.picture = args.picture or Path('transfer_output', f'{args.name}.png')
    return args


if __name__ == '__main__':
    main()
