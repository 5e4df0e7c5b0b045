"""DINO with lightly, PyTorch Lightning, a timm ViT and MTE, with checkpoints.

    python examples/lightning_dino.py --data FOLDER --model vit_small_patch16_224 --epochs 100

A killed run goes on after its last whole epoch, from output/last.ckpt, when the same command is given again. The
teacher is exported to output/export: timm.create_model('local-dir:output/export', pretrained=True).
"""

import os
import sys

import pytorch_lightning as pl
import torch
from common import (
    Result,
    command_of,
    create_model,
    device,
    image_loader,
    make_parser,
    mixed_precision,
    require_same_run,
)
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import update_momentum
from lightly.transforms import DINOTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from timm.optim import create_optimizer_v2

import mte_timm as mte


class DINO(pl.LightningModule):
    def __init__(self, args, backbone, num_views):
        super().__init__()

        def head(dim):
            return DINOProjectionHead(dim, output_dim=args.prototypes, freeze_last_layer=1)

        def lightly_order(loss, student, teacher, **kwargs):
            with torch.autocast(student.device.type, enabled=False):  # sums over prototypes need float32
                return loss(teacher.float().chunk(2), student.float().chunk(num_views), **kwargs)

        self.student = mte.wrap(backbone, head=head)
        self.teacher = mte.make_teacher(self.student)
        self.criterion = mte.MTELoss(DINOLoss(args.prototypes, warmup_teacher_temp_epochs=5), call=lightly_order)
        self.args, self.losses = args, []

    def training_step(self, batch, batch_idx):
        views, _ = batch
        with torch.no_grad():
            targets = self.teacher(views[:2])
        loss = self.criterion(self.student(views), targets, epoch=self.current_epoch)
        self.log('loss', loss, on_step=False, on_epoch=True)
        return loss

    def on_after_backward(self):
        self.student.aux.global_head.cancel_last_layer_gradients(self.current_epoch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        momentum = cosine_schedule(self.global_step - 1, self.trainer.estimated_stepping_batches, 0.996, 1.0)
        update_momentum(self.student, self.teacher, momentum)

    def on_train_epoch_end(self):
        self.losses.append(self.trainer.callback_metrics['loss'].item())
        self.print(f'epoch {self.current_epoch + 1}/{self.trainer.max_epochs}: loss {self.losses[-1]:.4f}')
        self.seed_epoch(self.current_epoch + 1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint |= {'command': command_of(self.args), 'losses': self.losses}

    def on_load_checkpoint(self, checkpoint):
        self.losses = checkpoint['losses']
        require_same_run(self.args.out / 'last.ckpt', checkpoint['command'], len(self.losses), self.args)
        self.seed_epoch(len(self.losses))
        for schedule in checkpoint['lr_schedulers']:  # its length is that of now
            del schedule['warmup_epochs'], schedule['max_epochs']

    def on_train_start(self):
        scheduler = self.lr_schedulers()
        for group in scheduler.optimizer.param_groups:
            group['lr'] = group['initial_lr'] * scheduler.scale_lr(self.global_step)

    def seed_epoch(self, epoch):
        # before Lightning draws the first batch, so that a resumed run sees what an uninterrupted one would
        pl.seed_everything(self.args.seed + epoch, verbose=False)

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        optimizer = create_optimizer_v2(self.student, 'adamw', lr=self.args.lr, weight_decay=0.04)
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=steps // 10, max_epochs=steps)
        return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': scheduler, 'interval': 'step'}}


class OldOrNew(TorchCheckpointIO):
    """Puts a checkpoint in place when it is whole: Lightning moves it there from /tmp, which may be another disk."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, f'{path}.tmp', storage_options)
        os.replace(f'{path}.tmp', path)


def main(argv=None):
    parser = make_parser(__doc__, lr=5e-4)
    parser.add_argument('--local-size', type=int, default=96, help='size of the small views')
    parser.add_argument('--prototypes', type=int, default=65536)
    args = parser.parse_args(argv)
    pl.seed_everything(args.seed)

    transform = DINOTransform(global_crop_size=args.img_size, local_crop_size=args.local_size)
    loader = image_loader(args, transform)
    backbone = create_model(args, num_classes=0, dynamic_img_size=True)
    model = DINO(args, backbone, len(transform.transforms))
    _, scaler = mixed_precision()
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        devices=1,
        precision='32-true' if device.type == 'cpu' else '16-mixed' if scaler.is_enabled() else 'bf16-mixed',
        gradient_clip_val=3.0,
        callbacks=ModelCheckpoint(args.out, 'last', enable_version_counter=False),
        plugins=OldOrNew(),
        enable_progress_bar=sys.stdout.isatty(),
        default_root_dir=args.out,
    )
    last = args.out / 'last.ckpt'
    trainer.fit(model, loader, ckpt_path=last if last.exists() else None)

    export = mte.save_pretrained(model.teacher, args.out / 'export', **IMAGENET_NORMALIZE)
    return Result(model.losses, export, model.teacher, model.criterion)


if __name__ == '__main__':
    main()
