"""Backbones with and without MTE on other tasks, as a part of REPORT.md.

Owns which runs are compared and how that reads. Knows nothing of how they were made.
"""

import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.intervals import difference

__all__ = ['report', 'table']

WEIGHTS = re.compile(r'((?P<images>\w+)-)?(?P<method>\w+)-(?P<variant>plain|mte)-seed(?P<seed>\d+)(?P<new>-untrained)?')
METRICS = {'top1': 'accuracy', 'miou': 'mean IoU', 'map': 'box mAP', 'map 50': 'box mAP at 0.5', 'mask map': 'mask mAP'}
PAPER = {('segment', 'miou'): 1.2, ('detect', 'map'): 0.9, ('detect', 'mask map'): 1.0}  # iBOT, fine-tuned
METHODS = {'moco_v3': 'MoCo v3', 'dino': 'DINO', 'ibot': 'iBOT', 'byol': 'BYOL', 'moby': 'MoBY'}
TASKS = {
    'knn': 'k-NN',
    'linear': 'linear probing',
    'finetune': 'fine-tuning',
    'segment': 'segmentation',
    'detect': 'detection',
}
TEXT = """
Backbones of Tab. 5 above, exported and loaded by timm, on other images and tasks (`make transfer`): those of
Imagenette, and where it says so those of CIFAR-10, on Imagenette at 32 pixels; seeds are of pre-training. Frozen: only
what stands on the backbone is trained, with segmentation a linear layer. Else all of it, with UPerNet or Faster R-CNN.
CamVid has 367 training and 233 test pictures of roads, BCCD 292 and 72 of blood cells, of CIFAR-10 10,000 training
images are used. Recipes were set once for both, and not tuned. Untrained is a new network of the same architecture. In
pictures of 180x240 torchvision rounds the stride of anchors, 7 for 7.83, for all. The paper's differences are of iBOT,
fine-tuned: UPerNet on ADE20K, Cascade Mask R-CNN on COCO (Tab. 10 and 11).
"""


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each task, data set and accuracy of which there are runs both plain and with MTE.

    They are known by the names of their weights: METHOD-VARIANT-seedN, or IMAGES-METHOD-VARIANT-seedN where the
    backbones were trained on other images than the others.

    Runs of the same weights with several seeds of training count as their mean.
    """
    found: dict[tuple[Any, ...], dict[str, dict[int, list[float]]]] = {}
    for line in results.values():
        if not (of := WEIGHTS.fullmatch(line['weights'])):
            continue
        frozen, task = line.get('frozen', False), list(TASKS).index(line['task'])
        for metric in METRICS.keys() & line['result'].keys():
            place = of['images'] or '', of['method'], task, not frozen, line['data'], list(METRICS).index(metric)
            variant = 'untrained' if of['new'] else of['variant']
            runs = found.setdefault(place, {}).setdefault(variant, {}).setdefault(int(of['seed']), [])
            runs.append(line['result'][metric])
    rows = ['| method | task | data | accuracy | untrained | plain | MTE | difference | the paper | seeds |']
    rows.append('|---|---|---|---|---:|---:|---:|---:|---:|---:|')
    for (images, method, at, learns, data, which), by_variant in sorted(found.items()):
        plain, ours = (
            {s: statistics.mean(runs) for s, runs in by_variant.get(v, {}).items()} for v in ('plain', 'mte')
        )
        if (diff := difference(ours, plain)) is None:
            continue
        (task, title), (metric, accuracy) = list(TASKS.items())[at], list(METRICS.items())[which]
        paper = PAPER.get((task, metric)) if learns else None
        new = [run for runs in by_variant.get('untrained', {}).values() for run in runs]
        means = f'{statistics.mean(new):.1f}' if new else '', f'{diff.reference:.1f}', f'{diff.ours:.1f}'
        of = METHODS.get(method, method) + f', of {images}' * bool(images)
        cells = [of, title + ', frozen' * (not learns), data, accuracy, *means, str(diff)]
        cells += ['' if paper is None else f'{paper:+.1f}', ', '.join(map(str, sorted(plain.keys() & ours.keys())))]
        rows.append(f'| {" | ".join(cells)} |')
    return rows


def report(path: Path) -> list[str]:
    """The section of REPORT.md; nothing where there are no results."""
    results = records.read(path)
    rows = table(results)
    pixels = [
        f'{line["result"]["top1"]:.1f} ({TASKS[line["task"]]}, {line["data"]} at {line["size"][0]} pixels)'
        for line in results.values()
        if line['weights'] == 'pixels'
    ]
    said = f'Raw pixels have {", ".join(pixels)}.' if pixels else ''
    text = f'{" ".join(TEXT.split())} {said}'.rstrip()
    return ['\n'.join(['## Transfer', '', text, '', *rows]) + '\n'] if len(rows) > 2 else []
