"""iBOT with lightly, a timm ViT and MTE.

    python examples/lightly_ibot.py --data FOLDER --model vit_small_patch16_224 --epochs 100

MTE is on the loss of the class tokens. The loss of masked patches, whose head is the class token's, is added to it once
and unscaled. The teacher is exported to output/export: timm.create_model('local-dir:output/export', pretrained=True).
"""

import torch
from common import Checkpoint, Progress, Result, create_model, device, image_loader, make_parser, mixed_precision
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import random_block_mask, update_momentum
from lightly.transforms import IBOTTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import nn

import mte_timm as mte


class Masking(nn.Module):
    """A forward hook for ``patch_embed`` that puts a learnt token in the place of masked patches.

    The token is no part of the backbone, so what is exported is the plain timm model.
    """

    def __init__(self, dim):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(dim))
        self.mask = None  # B, H, W

    def forward(self, patch_embed, images, patches):
        return patches if self.mask is None else torch.where(self.mask[..., None], self.token, patches)  # B, H, W, D


def main(argv=None):
    parser = make_parser(__doc__, lr=5e-4)
    parser.add_argument('--local-size', type=int, default=96, help='size of the small views')
    parser.add_argument('--prototypes', type=int, default=8192)
    args = parser.parse_args(argv)
    random_seed(args.seed)

    transform = IBOTTransform(global_crop_size=args.img_size, local_crop_size=args.local_size)
    loader = image_loader(args, transform)
    num_views = len(transform.transforms)

    def head(dim):
        return DINOProjectionHead(dim, output_dim=args.prototypes, freeze_last_layer=1)

    backbone = create_model(args, num_classes=0, dynamic_img_size=True)
    student = mte.wrap(backbone, head=head).to(device)
    teacher = mte.make_teacher(student)
    masking = Masking(backbone.embed_dim).to(device)
    backbone.patch_embed.register_forward_hook(masking)

    def lightly_order(loss, student, teacher, **kwargs):
        with torch.autocast(student.device.type, enabled=False):  # sums over prototypes need float32
            return loss(teacher.float().chunk(2), student.float().chunk(num_views), **kwargs)

    criterion = mte.MTELoss(DINOLoss(args.prototypes, warmup_teacher_temp_epochs=5), call=lightly_order).to(device)
    patch_criterion = IBOTPatchLoss(args.prototypes).to(device)

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
                patch_loss = patch_criterion(patch_targets, student.aux.global_head(out.tokens.patches[masked]), mask)
                loss = criterion(both, targets, epoch=epoch) + patch_loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            student.aux.global_head.cancel_last_layer_gradients(epoch)
            nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            update_momentum(student, teacher, cosine_schedule(step, steps, 0.996, 1.0))
            progress.add(loss)
        progress.end_epoch()
        checkpoint.save()

    export = mte.save_pretrained(teacher, args.out / 'export', **IMAGENET_NORMALIZE)
    return Result(progress.losses, export, teacher, criterion)


if __name__ == '__main__':
    main()
