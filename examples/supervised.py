"""Supervised training with timm's own parts and MTE.

    python examples/supervised.py --data FOLDER --model vit_small_patch16_224 --epochs 300 --mixup 0.8 --cutmix 1
    python examples/supervised.py --data FOLDER --model convnext_tiny --n-cls 0 --epochs 300 --mixup 0.8 --cutmix 1
    python examples/supervised.py --data FOLDER --model-kwargs pretrained=True --epochs 20 --lr 1e-4 --layer-decay 0.75

FOLDER has a folder `train` and a folder `val`, each with a folder of images for every class. What is evaluated after
each epoch, and exported to output/export, is the plain model with averaged weights:
timm.create_model('local-dir:output/export', pretrained=True).
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from common import Checkpoint, Progress, create_model, device, make_parser, mixed_precision, require_batch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import nn

import mte_timm as mte


class Result(NamedTuple):
    losses: list[float]  # mean of each epoch
    accuracies: list[float]  # of the averaged plain model on FOLDER/val after each epoch, in percent
    export: Path
    model: nn.Module


def image_folder(args, split, class_map=None):
    if not (args.data / split).is_dir():
        sys.exit(f'error: --data {args.data}: has no folder {split}; it needs train and val')
    try:
        return create_dataset('', root=args.data / split, search_split=False, class_map=class_map)
    except RuntimeError as e:
        sys.exit(f'error: --data {args.data}: {split} must hold a folder of images for each class. {e}')


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    top1 = AverageMeter()
    for images, labels in loader:
        top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    return top1.avg


def main(argv=None):
    parser = make_parser(__doc__, lr=1e-3)
    parser.add_argument('--n-cls', type=int, default=4, help='auxiliary CLS tokens; 0 for models other than ViTs')
    parser.add_argument('--mixup', type=float, default=0.0, metavar='ALPHA', help='e.g. 0.8')
    parser.add_argument('--cutmix', type=float, default=0.0, metavar='ALPHA', help='e.g. 1')
    parser.add_argument('--layer-decay', type=float, help='e.g. 0.75 to fine-tune')
    parser.add_argument('--ema-decay', type=float, default=0.9998)
    args = parser.parse_args(argv)
    random_seed(args.seed)

    train_images = image_folder(args, 'train')
    classes = train_images.reader.class_to_idx
    val_images = image_folder(args, 'val', class_map=classes)
    require_batch(train_images, args)
    backbone = create_model(args, num_classes=len(classes))
    options = dict(
        batch_size=args.batch_size,
        num_workers=args.workers,
        device=device,
        pin_memory=device.type == 'cuda',
        **resolve_data_config({'img_size': args.img_size}, model=backbone),
    )
    train_loader = create_loader(train_images, is_training=True, auto_augment='3a', re_prob=0.25, **options)
    val_loader = create_loader(val_images, **options)
    mixup = Mixup(args.mixup, args.cutmix, num_classes=len(classes)) if args.mixup or args.cutmix else None

    model = mte.wrap(backbone, n_cls=args.n_cls).to(device)
    criterion = mte.MTECrossEntropy()

    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True)
    optimizer = create_optimizer_v2(model, 'adamw', lr=args.lr, weight_decay=0.05, layer_decay=args.layer_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=args.epochs // 20,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    autocast, scaler = mixed_precision()
    progress = Progress(args.epochs)
    checkpoint = Checkpoint(args, model=model, ema=ema, optimizer=optimizer, scaler=scaler, progress=progress)
    scheduler.step_update(checkpoint.epoch * len(train_loader))
    for epoch in range(checkpoint.epoch, args.epochs):
        model.train()
        for step, (images, labels) in enumerate(progress.epoch(train_loader), epoch * len(train_loader) + 1):
            if mixup is not None:
                images, labels = mixup(images, labels)
            with autocast():
                loss = criterion(model(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step_update(step)
            ema.update(model, step)
            progress.add(loss)
        progress.accuracies.append(evaluate(mte.strip(ema), val_loader))
        progress.end_epoch(f', accuracy {progress.accuracies[-1]:.1f}%')
        checkpoint.save()

    export = mte.save_pretrained(ema, args.out / 'export', img_size=args.img_size)
    return Result(progress.losses, progress.accuracies, export, ema.module)


if __name__ == '__main__':
    main()
