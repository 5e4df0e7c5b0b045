"""Self-supervised pre-training of a small ViT, plain and with MTE, up to the exported timm model.

    make demo                                                         # real images that come with the repository
    python -m benchmarks.demo --data FOLDER --model vit_small_patch16_224 --img-size 224 --epochs 100

The method is contrastive learning with a momentum teacher (MoCo v3 without its predictor): InfoNCE between
the student's projection of one view and the teacher's of the other. Both runs have the same epochs, data order,
schedule and initial backbone. FOLDER has a folder `train` and a folder `val` or `test`, each with a folder of
images for every class.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
from PIL import Image
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import tqdm

import mte_timm as mte
from benchmarks.common import Sample, features, info_nce
from mte_timm.analysis import knn_accuracy, plot_accuracy, plot_pooling

matplotlib.use('Agg')


class TwoViews:
    """Two random views of an image."""

    def __init__(self, size: int, mean: list[float], std: list[float]) -> None:
        self.view = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.3, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(brightness=0.4, contrast=0.4),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [self.view(image), self.view(image)]


def projector(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128))


def train(args: argparse.Namespace, loader: DataLoader, with_mte: bool) -> tuple[nn.Module, nn.Module, float]:
    """One run from scratch. Returns the student, its plain timm model and the seconds it took."""
    torch.manual_seed(args.seed)
    model = make_backbone(args)
    if with_mte:
        # the three lines: wrap the model, wrap the loss, (at the end) strip
        student = mte.wrap(model, n_cls=args.n_cls, n_pool=args.n_pool, head=projector)
        criterion = mte.MTELoss(info_nce)
    else:
        student = nn.Sequential(model, projector(model.head_hidden_size))
        criterion = info_nce
    student.to(args.device).train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    groups = param_groups_weight_decay(student, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.05)
    total = args.epochs * len(loader)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    with tqdm(total=total, desc='MTE' if with_mte else 'plain', unit='step') as bar:
        for step, (views, _) in enumerate(batch for _ in range(args.epochs) for batch in loader):
            for group in optimizer.param_groups:
                warm_up = min(1.0, (step + 1) / (0.1 * total))
                group['lr'] = args.lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / total))
            images = torch.cat(views).to(args.device)
            with torch.no_grad():
                target = teacher(images)
            loss = criterion(student(images), target)
            if not loss.isfinite():
                sys.exit(f'error: the loss is {loss.item()} at step {step}; try a lower --lr')
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            momentum = 1 - (1 - args.momentum) * 0.5 * (1 + math.cos(math.pi * step / total))
            with torch.no_grad():
                for t, s in zip(teacher.parameters(), student.parameters()):
                    t.lerp_(s, 1 - momentum)
            bar.set_postfix(loss=f'{loss.item():.3f}', refresh=False)
            bar.update()
    return student, model, time.perf_counter() - start


def make_backbone(args: argparse.Namespace) -> nn.Module:
    # statistics of the images, for the model's own config
    cfg = {'mean': tuple(args.mean), 'std': tuple(args.std)}
    return timm.create_model(args.model, num_classes=0, pretrained_cfg_overlay=cfg, **args.model_kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, help='folder with train/ and val/; default: a sample of Fashion-MNIST')
    parser.add_argument('--model', help='timm architecture; default: a ViT of 4 blocks and width 96')
    parser.add_argument('--img-size', type=int, help='default: 28 for the sample, else 224')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument(
        '--momentum', type=float, default=0.95, help='of the teacher at the start; 0.99 and more for long schedules'
    )
    parser.add_argument('--n-cls', type=int, default=4)
    parser.add_argument('--n-pool', type=int, default=6)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=int, default=0, help='processes that read images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('-o', '--output', type=Path, default=Path('demo_output'))
    args = parser.parse_args()

    size = args.img_size or (224 if args.data else 28)
    args.model_kwargs = {'img_size': size}
    if args.model is None:
        args.model = 'vit_tiny_patch16_224'
        args.model_kwargs |= {'patch_size': max(4, size // 7), 'embed_dim': 96, 'depth': 4, 'num_heads': 3}
    if args.data:
        held_out = next((args.data / d for d in ('val', 'test') if (args.data / d).is_dir()), None)
        if held_out is None or not (args.data / 'train').is_dir():
            parser.error(f'--data {args.data}: needs folders train and val (or test), with a folder for each class')
        folders = (args.data / 'train', held_out)
        args.mean, args.std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        load: Any = datasets.ImageFolder
    else:
        folders = ('train', 'test')
        args.mean, args.std = [0.286], [0.353]
        args.model_kwargs['in_chans'] = 1
        load = Sample
    normalize = [transforms.ToTensor(), transforms.Normalize(args.mean, args.std)]
    plain_view = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), *normalize])
    try:
        make_backbone(args)
    except TypeError:  # architectures without a fixed size don't take img_size
        del args.model_kwargs['img_size']
    try:
        mte.wrap(make_backbone(args), n_cls=args.n_cls, n_pool=args.n_pool, head=projector)
    except (ValueError, RuntimeError) as e:
        parser.error(str(e))

    def loader(folder: Any, transform: Any, **kwargs: Any) -> DataLoader:
        return DataLoader(load(folder, transform=transform), args.batch_size, num_workers=args.workers, **kwargs)

    evaluation = [loader(folder, plain_view) for folder in folders]
    raw = [tuple(map(torch.cat, zip(*((x.flatten(1), y) for x, y in part)))) for part in evaluation]
    rows = [('raw pixels (reference)', knn_accuracy(*raw), None)]
    torch.manual_seed(args.seed)
    untrained = make_backbone(args)
    rows.append(('untrained network', knn_accuracy(*(features(untrained, e, args.device) for e in evaluation)), None))
    for name, with_mte in (('plain', False), ('MTE', True)):
        generator = torch.Generator().manual_seed(args.seed)
        batches = loader(
            folders[0], TwoViews(size, args.mean, args.std), shuffle=True, drop_last=True, generator=generator
        )
        student, trained, seconds = train(args, batches, with_mte)
        accuracy = knn_accuracy(*(features(trained, e, args.device) for e in evaluation))
        rows.append((f'{name}, {args.epochs} epochs', accuracy, seconds))

    args.output.mkdir(parents=True, exist_ok=True)
    export = mte.save_pretrained(student, args.output / 'export', img_size=size, mean=args.mean, std=args.std)
    loaded = timm.create_model(f'local-dir:{export}', pretrained=True).eval()
    images = next(iter(evaluation[1]))[0]
    with torch.no_grad():
        student.cpu().eval()
        if not torch.equal(loaded(images), student(images).tokens.global_token):
            sys.exit('error: the exported model differs from the trained one')
    plot_accuracy(student, *evaluation).savefig(args.output / 'accuracy.png', dpi=150)
    figure = args.output / 'pooling.png'
    if args.n_pool:
        scale, shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (args.std, args.mean))
        plot_pooling(student, images[:6], images[:6] * scale + shift).savefig(figure, dpi=150)

    print(f'\n{"":28}{"k-NN accuracy":>14}{"time":>9}')
    for name, accuracy, seconds in rows:
        print(f'{name:28}{accuracy:13.1f}%{f"{seconds:8.0f}s" if seconds else "":>9}')
    print(f"\nexported to {export}; loaded by timm.create_model, its features equal the trained model's bit for bit")
    print(f'accuracy of each token, of all together, and after strip: {args.output / "accuracy.png"}')
    if args.n_pool:
        print(f'what the pooled tokens look at: {figure}')
    result = {'options': {k: str(v) for k, v in vars(args).items()}, 'rows': [list(r) for r in rows]}
    written = args.output / 'result.json.tmp'
    written.write_text(json.dumps(result, indent=1))
    os.replace(written, args.output / 'result.json')


if __name__ == '__main__':
    main()
