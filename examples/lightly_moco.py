"""MoCo v2 with lightly, a timm ViT and MTE.

    python examples/lightly_moco.py --data FOLDER --model vit_small_patch16_224 --epochs 100

The memory bank holds keys of the auxiliary ensemble and advances once a step. The student is exported to output/export:
timm.create_model('local-dir:output/export', pretrained=True).
"""

import torch
from common import Checkpoint, Progress, Result, create_model, device, image_loader, make_parser, mixed_precision
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import update_momentum
from lightly.transforms import MoCoV2Transform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from timm.optim import create_optimizer_v2
from timm.utils import random_seed

import mte_timm as mte


def main(argv=None):
    parser = make_parser(__doc__, lr=1.5e-4)
    parser.add_argument('--memory-bank', type=int, default=65536, help='number of negatives')
    args = parser.parse_args(argv)
    random_seed(args.seed)

    loader = image_loader(args, MoCoV2Transform(args.img_size))

    student = mte.wrap(create_model(args, num_classes=0), head=MoCoProjectionHead).to(device)
    teacher = mte.make_teacher(student)
    criterion = mte.MTELoss(NTXentLoss(temperature=0.2, memory_bank_size=(args.memory_bank, 128))).to(device)

    steps = args.epochs * len(loader)
    optimizer = create_optimizer_v2(student, 'adamw', lr=args.lr, weight_decay=0.1)
    autocast, scaler = mixed_precision()
    progress = Progress(args.epochs)
    checkpoint = Checkpoint(
        args, online=student, target=teacher, criterion=criterion, optimizer=optimizer, scaler=scaler, progress=progress
    )
    done = checkpoint.epoch * len(loader)
    scheduler = CosineWarmupScheduler(optimizer, steps // 10, steps, last_epoch=done - 1)
    for epoch in range(checkpoint.epoch, args.epochs):
        for step, (views, _) in enumerate(progress.epoch(loader), epoch * len(loader)):
            query, key = (view.to(device, non_blocking=True) for view in views)
            with autocast():
                with torch.no_grad():
                    targets = teacher(key)
                loss = criterion(student(query), targets)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            update_momentum(student, teacher, cosine_schedule(step, steps, 0.996, 1.0))
            progress.add(loss)
        progress.end_epoch()
        checkpoint.save()

    export = mte.save_pretrained(student, args.out / 'export', **IMAGENET_NORMALIZE)
    return Result(progress.losses, export, student, criterion)


if __name__ == '__main__':
    main()
