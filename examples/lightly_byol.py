"""BYOL with lightly, a timm ViT and MTE.

    python examples/lightly_byol.py --data FOLDER --model vit_small_patch16_224 --epochs 100

The auxiliary stream has a predictor of its own. The student is exported to output/export:
timm.create_model('local-dir:output/export', pretrained=True).
"""

import torch
from common import Checkpoint, Progress, Result, create_model, device, image_loader, make_parser, mixed_precision
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from timm.optim import create_optimizer_v2
from timm.utils import random_seed

import mte_timm as mte


def main(argv=None):
    args = make_parser(__doc__, lr=3e-4).parse_args(argv)
    random_seed(args.seed)

    transform = BYOLTransform(BYOLView1Transform(args.img_size), BYOLView2Transform(args.img_size))
    loader = image_loader(args, transform)

    student = mte.wrap(create_model(args, num_classes=0), head=BYOLProjectionHead).to(device)
    teacher = mte.make_teacher(student)
    predictor, aux_predictor = BYOLPredictionHead().to(device), BYOLPredictionHead().to(device)
    criterion = mte.MTELoss(NegativeCosineSimilarity())

    def predict(images):
        out = student(images)
        return out._replace(output=predictor(out.output), aux=aux_predictor(out.aux))

    steps = args.epochs * len(loader)
    optimizer = create_optimizer_v2(student, 'adamw', lr=args.lr, weight_decay=0.1)
    optimizer.add_param_group({'params': [*predictor.parameters(), *aux_predictor.parameters()], 'weight_decay': 0.1})
    autocast, scaler = mixed_precision()
    progress = Progress(args.epochs)
    checkpoint = Checkpoint(
        args,
        online=student,
        target=teacher,
        predictor=predictor,
        aux_predictor=aux_predictor,
        optimizer=optimizer,
        scaler=scaler,
        progress=progress,
    )
    done = checkpoint.epoch * len(loader)
    scheduler = CosineWarmupScheduler(optimizer, steps // 10, steps, last_epoch=done - 1)
    for epoch in range(checkpoint.epoch, args.epochs):
        for step, (views, _) in enumerate(progress.epoch(loader), epoch * len(loader)):
            x0, x1 = (view.to(device, non_blocking=True) for view in views)
            with autocast():
                with torch.no_grad():
                    target0, target1 = teacher(x0), teacher(x1)
                loss = (criterion(predict(x0), target1) + criterion(predict(x1), target0)) / 2
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
