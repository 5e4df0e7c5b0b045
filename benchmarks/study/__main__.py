"""Repeats the paper's experiments and writes what came out.

    python -m benchmarks.study                      # all, on the sample of Fashion-MNIST: many hours on two cores
    python -m benchmarks.study --data torchvision:Imagenette:FOLDER --size 96
    python -m benchmarks.study --data torchvision:CIFAR10:FOLDER --size 32
    python -m benchmarks.study --only "Tab. 5"      # one table
    python -m benchmarks.study --smoke              # the whole path in three minutes
    python -m benchmarks.study --costs              # what a step costs, method by method, side by side
    python -m benchmarks.study --tune               # plain runs of other settings, on training images that are held out
    python -m benchmarks.study --plan vit-s --data torchvision:Imagenette:FOLDER --size 112 --minutes 9     # on a GPU
    torchrun --nproc_per_node=8 -m benchmarks.study --data FOLDER --model vit_small_patch16_224 --epochs 100

Runs come in the order in which they are worth most. A killed study goes on where it stopped: a run that is finished has
its line in --output, one that is not its checkpoint in --checkpoints. Several started side by side share the runs among
them. `python -m benchmarks.study.report` makes REPORT.md of the results.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.models import VisionTransformer

from benchmarks import records
from benchmarks.images import CACHE, Images, open_images
from benchmarks.study import draw, evaluate
from benchmarks.study.compare import SAME
from benchmarks.study.evaluate import features
from benchmarks.study.experiment import Experiment, Plan, runs_of, tuning_runs
from benchmarks.study.methods import ABLATIONS, METHODS
from benchmarks.study.plans import NAMED, plan_of
from benchmarks.study.report import report
from benchmarks.study.train import Run, identify, make_backbone, make_method, step_operations, step_times, train
from mte_timm.backbones import find_adapter

RESULTS = Path(__file__).parents[1] / 'results' / 'study'
MOST_PIXELS = 2_000_000_000  # of a training split whose pixels are compared
TOP = (5, 10, 20)  # patches by attention
LATER: dict[str, Any] = {  # what only some experiments ask for, or what networks are asked that were trained before
    'fine-tuned': lambda network, images, device: evaluate.fine_tuned(network.backbone, images, device=device),
    SAME: evaluate.same_features_with_tokens,
}


def measure(run: Run, images: Images, args: argparse.Namespace, watch_every: int) -> tuple[dict[str, Any], Any]:
    """Trains and evaluates; the result and the network."""

    def watch(method: Any, epoch: int) -> dict[str, Any]:
        return evaluate.watched(method.evaluated, images, args.device, features_path(run, epoch, args))

    method, state = train(run, images, args.checkpoints, args.device, 120, watch, watch_every, args.until)
    network = method.evaluated
    result: dict[str, Any] = {
        **json.loads(identify(run, images)),
        'made by': made_by(),
        'seconds': state['seconds'],
        'reading': state['reading'],
        'steps': state['step'],
        'losses': mean_of_tenths(state['losses']),
        'watched': state['watched'],
        'accuracy': evaluate.accuracies(network, images, args.device),
    }
    accuracy = result['accuracy']
    if type(network.backbone) is VisionTransformer:
        accuracy['patches'] = evaluate.patch_accuracies(network.backbone, images, TOP, args.device)
        if run.mte is None and run.method == 'dino':
            accuracy['random tokens'] = evaluate.random_token_accuracies(network.backbone, images, args.device)
    if method.classifies:
        accuracy['top1'] = top1(network.backbone, images, args.device)
    return result, network


def made_by() -> dict[str, Any]:
    """Versions, and what the time of a step depends on."""
    git = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=RESULTS.parent, capture_output=True, text=True)
    versions = {'torch': torch.__version__, 'timm': timm.__version__, 'commit': git.stdout.strip() or None}
    return {**versions, 'threads': torch.get_num_threads()}


def network_path(run: Run, args: argparse.Namespace) -> Path:
    path: Path = args.checkpoints / f'{run.name}.network.pt'
    return path


def features_path(run: Run, epoch: int, args: argparse.Namespace) -> Path:
    path: Path = args.checkpoints / f'{run.name}.features' / f'{epoch}.pt'
    return path


def keep(network: torch.nn.Module, identity: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    torch.save({'identity': identity, 'network': network.state_dict()}, temporary)
    temporary.replace(path)


def kept(run: Run, images: Images, args: argparse.Namespace) -> Any:
    """The network that a run ended with, or None where it is gone or was overwritten by one of other settings."""
    path = network_path(run, args)
    saved = torch.load(path, map_location='cpu', weights_only=True) if path.exists() else {}
    if saved.get('identity') != identify(run, images):
        return None
    network = make_method(run, images).evaluated
    network.load_state_dict(saved['network'])
    return network


def evaluate_later(run: Run, metric: str, images: Images, path: Path, args: argparse.Namespace) -> None:
    """Adds ``metric`` to the line of ``run``."""
    result = records.read(path).get(run.name)
    if result is None or metric in result['accuracy']:
        return
    network = kept(run, images, args)
    if network is None:
        print(f'{run.name}: its network is not in {args.checkpoints}, so {metric} is left out', file=sys.stderr)
        return
    result['accuracy'][metric] = LATER[metric](network, images, args.device)
    records.put(path, run.name, result)
    print(f'{run.name}: {metric} {result["accuracy"][metric]}', flush=True)


def concatenate(runs: list[Run], images: Images, path: Path, args: argparse.Namespace) -> None:
    """k-NN of each pair of seeds side by side (paper Tab. 4), at the end and by epoch."""
    for a, b in itertools.combinations(runs, 2):
        if (a.method, a.variant) != (b.method, b.variant):
            continue
        found = records.read(path).get('side-by-side', {}).get('networks', {})
        name = f'{a.method}, {a.variant}'
        of = hashlib.sha256(identify(a._replace(seed=-1), images).encode()).hexdigest()  # all but the seeds
        if found.get(name, {}).get('of', of) != of:
            del found[name]
            records.put(path, 'side-by-side', {'networks': found})
        entry = found.get(name, {'of': of, 'pairs': {}, 'by epoch': {}})
        key = f'{a.seed}+{b.seed}'
        networks = [] if key in entry['pairs'] else [kept(run, images, args) for run in (a, b)]
        if None in networks:
            print(f'{a.name} and {b.name}: not both in {args.checkpoints}, so their pair is left out', file=sys.stderr)
        elif networks:
            entry['pairs'][key] = evaluate.concatenated(networks, images, args.device)
            epochs = [e for e in range(a.epochs + 1) if all(features_path(run, e, args).exists() for run in (a, b))]
            entry.setdefault('by epoch', {})[key] = {
                epoch: evaluate.side_by_side(*(torch.load(features_path(run, epoch, args)) for run in (a, b)))
                for epoch in epochs
            }
            found[name] = entry
            records.put(path, 'side-by-side', {'networks': found})


def costs(runs: list[Run], images: Images, path: Path, args: argparse.Namespace) -> None:
    """Parameters, operations and the time of a step, plain and with MTE, step by step in turn; and of its views."""
    pairs: dict[str, dict[str, Run]] = {}
    for run in runs:
        if run.variant in ('plain', 'mte'):
            pairs.setdefault(run.method, {})[run.variant] = run
    for name, forms in pairs.items():
        times, parameters, reading = step_times(list(forms.values()), images, args.device, 2 if args.smoke else 12)
        each = {form: statistics.median(t) for form, t in zip(forms, times)}
        plain = times[list(forms).index('plain')]
        found = records.read(path).get('costs', {}).get('methods', {})
        found[name] = {
            form: {
                'parameters': count,
                'operations': step_operations(forms[form], images),
                'seconds': each[form],
                'ratios': statistics.quantiles([x / y for x, y in zip(t, plain)], n=4),
                'reading': statistics.median(reading),
                'threads': torch.get_num_threads(),
                'device': args.device,
            }
            for form, t, count in zip(forms, times, parameters)
        }
        records.put(path, 'costs', {'methods': found})
        share = found[name]['plain']['reading'] / (found[name]['plain']['reading'] + each['plain'])
        print(
            f'{name}: {each["plain"]:.3f} s plain, {found[name]["mte"]["ratios"][1]:.2f} of it with MTE; views take '
            f'{100 * share:.0f}% of the plain step', flush=True,
        )  # fmt: skip


def later(
    experiment: Experiment, runs: list[Run], images: Images, path: Path, args: argparse.Namespace, plan: Plan
) -> None:
    """What needs several runs, or networks of finished ones."""
    for metric in LATER.keys() & experiment.expected.keys():
        for run in runs:
            evaluate_later(run, metric, images, path, args)
    for run in runs:
        if run.mte is not None and run.mte.get('n_cls') and network_path(run, args).exists():
            evaluate_later(run, SAME, images, path, args)
    finished = records.read(path)
    if experiment.name in plan.pairs:
        concatenate([run for run in runs if run.name in finished], images, path, args)
    pictures = path.with_suffix('')
    if experiment.name == plan.pairs[0] and not all((pictures / n).exists() for n in draw.LOOKS.keys() - draw.OF_SOME):
        ours = [run for run in runs if run.variant == 'mte']
        networks = (kept(run, images, args) for run in ours if run.method == ours[0].method)
        shown = next((network for network in networks if network is not None), None)
        if shown is not None:  # all of one network
            draw.looks(shown, images, pictures)


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process is the one to work on ``path``; the claim ends with the body or the process.

    The processes of one torchrun work together: the first claims for all.

    Args:
        path: Of the lock.
        wait: Until it can be had.
    """
    if dist.is_initialized() and dist.get_rank():
        answer: list[Any] = [None]
        dist.broadcast_object_list(answer, src=0)
        yield bool(answer[0])
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            ours = True
        except BlockingIOError:
            ours = False
        if dist.is_initialized():
            dist.broadcast_object_list([ours], src=0)
        yield ours


def top1(backbone: Any, images: Images, device: str) -> float:
    """Percent right of the model's own classifier."""
    logits, labels = features(backbone, images, 'test', device)
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def mean_of_tenths(losses: list[float]) -> list[float]:
    size = max(1, len(losses) // 10)
    return [sum(part) / len(part) for i in range(0, len(losses), size) if (part := losses[i : i + size])]


def references(images: Images, models: list[str], seeds: int, path: Path, args: argparse.Namespace) -> None:
    """Adds what a run has to beat, where it is missing: pixels, and networks that were not trained."""
    versions = {'torch': torch.__version__, 'timm': timm.__version__}
    found = {'untrained': {}, **versions, **records.read(path).get('references', {})}
    by_model = {
        model: [make_backbone(Run('byol', None, seed=seed, model=model), images) for seed in range(seeds)]
        for model in models
    }
    attending = next((some for some in by_model.values() if find_adapter(some[0]).attends), [])
    if len(images.split('train')) * images.channels * images.size**2 < MOST_PIXELS and not found.get('raw pixels'):
        found['raw pixels'] = evaluate.raw_pixels(images)
        records.put(path, 'references', found)
    for model in by_model.keys() - found['untrained'].keys():
        found['untrained'][model] = [evaluate.knn_of(b, images, args.device) for b in by_model[model]]
        records.put(path, 'references', found)
    if not found.get('random tokens'):
        found['random tokens'] = [evaluate.random_token_accuracies(b, images, args.device) for b in attending]
        found['untrained patches'] = [evaluate.patch_accuracies(b, images, (), args.device)['all'] for b in attending]
        records.put(path, 'references', found)


def fitting(run: Run, images: Images) -> Run:
    """``run`` with options that its model can have: no auxiliary CLS tokens where nothing attends.

    Raises:
        ValueError: the method can't have this model.
    """
    attends = find_adapter(make_backbone(run, images)).attends
    if METHODS[run.method].of_patches and not attends:
        raise ValueError(
            f'--model: {run.model} has no patch tokens, which {run.method} needs; leave it out by --method'
        )
    if run.mte is None or attends:
        return run
    return run._replace(mte={**run.mte, 'n_cls': 0, 'n_pool': run.mte.get('n_pool') or 6})


def same(result: dict[str, Any], run: Run, images: Images) -> bool:
    """Whether ``result`` is of ``run``; settings that came later than it were the defaults then."""
    defaults: dict[str, Any] = {**ABLATIONS, **METHODS[run.method].defaults}
    was = json.loads(json.dumps({**result, 'settings': {**defaults, **result.get('settings', {})}}))
    return {k: was.get(k) for k in ('run', 'images', 'settings')} == json.loads(identify(run, images))


def main(argv: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', metavar='TABLE')
    parser.add_argument('--method', nargs='+', choices=list(METHODS), help='only runs of these methods')
    parser.add_argument('--variant', nargs='+', help='only runs of these variants')
    parser.add_argument('--data', default='sample', help='sample, torchvision:CLASS:ROOT, or a folder with train, val')
    parser.add_argument('--plan', choices=list(NAMED), help='default: the one for small images of this kind')
    parser.add_argument('--minutes', type=float, help='stop after so many; the same command goes on')
    parser.add_argument('--size', type=int, help='side of the images')
    parser.add_argument('--limit', type=int, nargs=2, default=(None, None), metavar=('TRAIN', 'TEST'))
    parser.add_argument('--model', help='of timm, for all methods')
    parser.add_argument('--epochs', type=int, help='of all methods')
    parser.add_argument('--precision', choices=['bfloat16', 'float32'], help='of training steps, default: bfloat16')
    parser.add_argument('--seeds', type=int, help='how many of all experiments')
    parser.add_argument('--cache', type=Path, default=CACHE, help='of decoded images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, help='default: benchmarks/results/study, with --smoke study_smoke')
    parser.add_argument('--checkpoints', type=Path, help='default: study_checkpoints, with --smoke in the output')
    parser.add_argument('--costs', action='store_true', help='measure the time of a step, and nothing else')
    parser.add_argument('--tune', action='store_true', help='plain runs of other settings, on held out training images')
    parser.add_argument('--smoke', action='store_true', help='each run on few images, for one epoch, up to the report')
    args = parser.parse_args(argv)
    if args.smoke:
        args.output = args.output or Path('study_smoke')
        args.checkpoints = args.checkpoints or args.output / 'checkpoints'
    args.output, args.checkpoints = args.output or RESULTS, args.checkpoints or Path('study_checkpoints')
    if 'LOCAL_RANK' in os.environ:
        dist.init_process_group()
        if args.device == 'cuda':
            args.device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(args.device)
    first = not dist.is_initialized() or dist.get_rank() == 0
    changes: dict[str, Any] = {k: v for k in ('model', 'epochs', 'precision') if (v := getattr(args, k))}
    if args.smoke:
        args.limit = (64, 48)
        changes = {'epochs': 1, 'batch_size': 16, **changes}
    try:
        images = open_images(args.data, args.size, tuple(args.limit), args.tune, args.cache)
        images.split('train')
    except ValueError as e:
        parser.error(str(e))
    plan = plan_of(images, args.plan or '')
    path = args.output / f'{"-".join(filter(None, [images.name, args.plan, "tuning" * args.tune]))}.jsonl'
    args.until = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    args.checkpoints = args.checkpoints / path.stem
    names = [e.name for e in plan.experiments]
    for name in set(args.only or ()) - set(names):
        parser.error(f'--only {name}: there are {", ".join(names)}')
    experiments = [e for e in plan.experiments if not args.only or e.name in args.only]
    if args.smoke:  # pairs need two
        experiments = [e._replace(seeds=2 if e.name == plan.pairs[0] else 1) for e in experiments]
    elif args.seeds:
        experiments = [e._replace(seeds=args.seeds) for e in experiments]
    asked = {e.name: runs_of(e, plan, **changes) for e in experiments}
    if args.tune:
        experiments, asked = [], {'tuning': tuning_runs(plan, **changes)}
    for of in ('method', 'variant'):
        if wanted := getattr(args, of):
            asked = {name: [run for run in some if getattr(run, of) in wanted] for name, some in asked.items()}
    if args.model:
        try:
            asked = {name: [fitting(run, images) for run in some] for name, some in asked.items()}
        except ValueError as e:
            parser.error(str(e))
    runs = {run.name: run for some in asked.values() for run in some}
    if args.costs:
        costs(list(runs.values()), images, path, args)
        return
    began = time.time()
    for i, run in enumerate(runs.values()):
        with claimed(args.checkpoints / f'{run.name}.lock') as ours:
            result = records.read(path).get(run.name)
            if result is not None:
                if not same(result, run, images):
                    sys.exit(
                        f'error: {run.name} in {path} is of other settings or images; remove its line, or choose '
                        'another --output'
                    )
                continue
            if not ours:
                continue
            result, network = measure(run, images, args, 1 if args.smoke else plan.watch_every)
            if first:
                keep(network, identify(run, images), network_path(run, args))
                records.put(path, run.name, result)
                (args.checkpoints / f'{run.name}.pt').unlink(missing_ok=True)
                accuracy = {k: round(v, 1) for k, v in result['accuracy'].items() if isinstance(v, float)}
                print(f'{i + 1}/{len(runs)} {run.name}: {accuracy}, {result["seconds"]:.0f} s', flush=True)
    if dist.is_initialized():  # what follows is for one
        dist.destroy_process_group()
    if not first or args.tune:
        return
    with claimed(args.checkpoints / 'later.lock', wait=True):
        models = {run.model for run in runs.values()}
        references(images, sorted(models, reverse=True), 1 if args.smoke else 3, path, args)
        for experiment in experiments:
            later(experiment, asked[experiment.name], images, path, args, plan)
    if args.smoke:
        costs([run for run in runs.values() if run.method == 'byol'], images, path, args)
        (args.output / 'REPORT.md').write_text(report(path, path.with_suffix(''), f'{path.stem}/'))
    print(f'{len(runs)} runs, {time.time() - began:.0f} s; results in {path}')


if __name__ == '__main__':
    main()
