"""DINOv2 with lightly, a timm ViT and MTE: class token, masked patches and KoLeo.

    python examples/lightly_dinov2.py --data FOLDER --epochs 100

The teacher is exported to output/export: timm.create_model('local-dir:output/export', pretrained=True).
"""

import torch
from common import Checkpoint, Progress, Result, create_model, device, image_loader, make_parser, mixed_precision
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead
from lightly.models.utils import random_block_mask, update_momentum
from lightly.transforms import DINOTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule, linear_warmup_schedule
from lightly_ibot import Masking
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import nn

import mte_timm as mte


def main(argv=None):
    parser = make_parser(__doc__, lr=1e-3, model='vit_small_patch14_dinov2')
    parser.add_argument('--local-size', type=int, default=98, help='size of the small views, a multiple of the patches')
    parser.add_argument('--prototypes', type=int, default=65536)
    args = parser.parse_args(argv)
    random_seed(args.seed)

    scales = {'global_crop_scale': (0.32, 1), 'local_crop_scale': (0.05, 0.32)}
    transform = DINOTransform(args.img_size, local_crop_size=args.local_size, n_local_views=8, **scales)
    loader = image_loader(args, transform)
    num_views = len(transform.transforms)

    def head(dim):
        return DINOv2ProjectionHead(dim, output_dim=args.prototypes)

    backbone = create_model(args, num_classes=0, dynamic_img_size=True, init_values=1e-5, drop_path_rate=0.1)
    student = mte.wrap(backbone, head=head).to(device)
    teacher = mte.make_teacher(student)
    masking = Masking(backbone.embed_dim).to(device)
    backbone.patch_embed.register_forward_hook(masking)

    def lightly_order(loss, student, teacher, **kwargs):
        with torch.autocast(student.device.type, enabled=False):  # sums over prototypes need float32
            return loss(teacher.float().chunk(2), student.float().chunk(num_views), **kwargs)

    criterion = mte.MTELoss(DINOLoss(args.prototypes), call=lightly_order).to(device)
    patch_criterion, koleo = IBOTPatchLoss(args.prototypes).to(device), KoLeoLoss()

    steps = args.epochs * len(loader)
    optimizer = create_optimizer_v2(student, 'adamw', lr=args.lr, weight_decay=0.04)
    optimizer.add_param_group({'params': masking.parameters(), 'weight_decay': 0.0})
    autocast, scaler = mixed_precision()
    progress = Progress(args.epochs)
    checkpoint = Checkpoint(
        args,
        student=student,
        teacher=teacher,
        masking=masking,
        criterion=criterion,
        patch_criterion=patch_criterion,
        optimizer=optimizer,
        scaler=scaler,
        progress=progress,
    )
    done = checkpoint.epoch * len(loader)
    scheduler = CosineWarmupScheduler(optimizer, steps // 10, steps, last_epoch=done - 1)
    for epoch in range(checkpoint.epoch, args.epochs):
        for step, (views, _) in enumerate(progress.epoch(loader), epoch * len(loader)):
            views = [view.to(device, non_blocking=True) for view in views]
            global_views = torch.cat(views[:2])
            temperature = linear_warmup_schedule(step, max(1, 3 * steps // 10), 0.04, 0.07)
            with autocast():
                with torch.no_grad():
                    targets = teacher(global_views)
                mask = random_block_mask((len(global_views), *targets.tokens.grid), device=device)
                masking.mask = mask
                out = student(global_views)
                masking.mask = None
                local = student(views[2:])
                both = out._replace(output=torch.cat([out.output, local.output]), aux=torch.cat([out.aux, local.aux]))

                masked = mask.flatten(1)
                with torch.no_grad():
                    patch_targets = teacher.aux.global_head(targets.tokens.patches[masked])
                of_patches = student.aux.global_head(out.tokens.patches[masked])
                loss = criterion(both, targets, teacher_temp=temperature)
                loss = loss + patch_criterion(patch_targets, of_patches, mask, teacher_temp=temperature)
                loss = loss + 0.1 * sum(map(koleo, out.tokens.global_token.float().chunk(2)))  # before the head
            for group in optimizer.param_groups:
                if group['weight_decay']:
                    group['weight_decay'] = cosine_schedule(step, steps, 0.04, 0.4)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            update_momentum(student, teacher, cosine_schedule(step, steps, 0.992, 1.0))
            progress.add(loss)
        progress.end_epoch()
        checkpoint.save()

    export = mte.save_pretrained(teacher, args.out / 'export', **IMAGENET_NORMALIZE)
    return Result(progress.losses, export, teacher, criterion)


if __name__ == '__main__':
    main()
