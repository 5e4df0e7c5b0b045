"""DINO or iBOT of stable-pretraining, with MTE.

    python examples/stable_pretraining_ssl.py --method ibot --data FOLDER --model vit_small_patch16_224 --epochs 100

`pip install stable-pretraining`. The teacher is exported to output/export, as by the scripts beside this one.
"""

import copy

import lightning as pl
import torch
from common import Result, create_model, device, make_parser, require_batch
from lightning.pytorch.callbacks import ModelCheckpoint
from stable_pretraining import methods
from stable_pretraining.callbacks import TeacherStudentCallback
from stable_pretraining.data import FromTorchDataset, transforms
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import mte_timm as mte


class Head(nn.Sequential):
    """A fresh copy of the framework's head, for tokens of width ``dim``; all tokens share its last layer."""

    def __init__(self, framework_head: nn.Sequential, dim: int) -> None:
        super().__init__()
        *projection, last_layer = copy.deepcopy(framework_head)
        projection[0] = nn.Linear(dim, projection[0].out_features)
        self.projection, self.last_layer = nn.Sequential(*projection), last_layer
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()


class WithMTE:
    """What both methods have in common: student and teacher carry tokens, and the framework moves the teacher."""

    def add_mte(self, head, **options) -> None:
        student = mte.wrap(self.backbone.student, head=lambda dim: Head(head, dim), **options)
        self.backbone.student, self.backbone.teacher = student, mte.make_teacher(student)
        self.losses = []

    def class_loss(self, student, teacher, batch_size):
        """(L_aux + L_dist) / 2: both against the teacher's ensemble, with which the center moves once."""
        of_ensemble, of_global, targets = (x.unflatten(0, (-1, batch_size)) for x in (*student[:2], teacher.aux))
        probabilities = self.dino_loss.softmax_center_teacher(targets, teacher_temp=self._teacher_temperature())
        loss = (self.dino_loss(of_ensemble, probabilities) + self.dino_loss(of_global, probabilities)) / 2
        self.dino_loss.update_center(targets)
        return loss

    def forward(self, batch, stage):
        images = {name: view['image'] for name, view in batch.items() if isinstance(view, dict)}
        kinds = ([x for name, x in images.items() if name.startswith(kind)] for kind in ('global', 'local'))
        loss, teacher = self.step(*kinds)
        self.log('loss', loss, on_step=False, on_epoch=True)
        return {'loss': loss, 'embedding': teacher.tokens.global_token, 'label': batch['global_1']['label']}

    def on_train_epoch_end(self):
        self.losses.append(self.trainer.callback_metrics['loss'].item())
        print(f'epoch {self.current_epoch + 1}/{self.trainer.max_epochs}: loss {self.losses[-1]:.4f}', flush=True)


class DINO(WithMTE, methods.DINO):
    def __init__(self, backbone, **settings):
        super().__init__(backbone, **settings)
        self.add_mte(self.projector.student)
        del self.projector

    def step(self, global_views, local_views):
        with torch.no_grad():
            teacher = self.backbone.forward_teacher(global_views)
        student = self.backbone.forward_student([*global_views, *local_views])
        return self.class_loss(student, teacher, len(global_views[0])), teacher


class IBOT(WithMTE, methods.iBOT):
    def __init__(self, backbone, **settings):
        super().__init__(backbone, **settings)
        self.add_mte(self.cls_head.student)
        del self.cls_head
        self.mask = None
        self.backbone.student.backbone.patch_embed.register_forward_hook(self.hide)

    def hide(self, module, inputs, patches):
        """Puts the mask token in the place of masked patches (B, H, W, D) of the student."""
        if self.mask is None:
            return patches
        mask = self.mask.view(*patches.shape[:-1], 1)
        return patches * (1 - mask) + self.mask_token.view(-1).to(patches) * mask

    def step(self, global_views, local_views):
        with torch.no_grad():
            teacher = self.backbone.forward_teacher(global_views)
            patches = torch.cat(teacher.tokens.patches)
            mask = self._random_mask(*patches.shape[:2], patches.device)
            targets = self.patch_head.forward_teacher(patches[mask.bool()])
        self.mask = mask
        student = self.backbone.forward_student(torch.cat(global_views))
        self.mask = None
        probabilities = self.ibot_patch_loss.sinkhorn_knopp_teacher(
            targets, teacher_temp=self._teacher_temperature(), num_samples=len(targets)
        )
        of_patches = self.patch_head.forward_student(student.tokens.patches[mask.bool()])
        loss = self.class_loss(student, teacher, len(global_views[0]))
        return loss + self.patch_loss_weight * self.ibot_patch_loss(of_patches, probabilities), teacher


def views(args):
    """Two large views and, for DINO, six small ones, of the framework's transforms."""

    def view(size, scale):
        return transforms.Compose(
            transforms.RGB(),
            transforms.RandomResizedCrop((size, size), scale=scale),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToImage(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
        )

    large = {f'global_{i + 1}': view(args.img_size, (0.4, 1.0)) for i in range(2)}
    small = {f'local_{i + 1}': view(args.local_size, (0.05, 0.4)) for i in range(6 * (args.method == 'dino'))}
    return transforms.MultiViewTransform(large | small)


def main(argv=None):
    parser = make_parser(__doc__, lr=5e-4)
    parser.add_argument('--method', choices=('dino', 'ibot'), default='dino')
    parser.add_argument('--local-size', type=int, default=96, help='size of the small views')
    parser.add_argument('--prototypes', type=int, default=65536)
    args = parser.parse_args(argv)
    pl.seed_everything(args.seed)

    images = FromTorchDataset(ImageFolder(args.data), names=['image', 'label'], transform=views(args))
    require_batch(images, args)
    loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    backbone = create_model(args, num_classes=0, dynamic_img_size=True)
    if args.method == 'dino':
        model = DINO(backbone, n_prototypes=args.prototypes)
    else:
        settings = {'n_cls_prototypes': args.prototypes, 'n_patch_prototypes': args.prototypes}
        model = IBOT(backbone, image_size=args.img_size, **settings)
    optimizer = {'type': 'AdamW', 'lr': args.lr, 'weight_decay': 0.04}
    schedule = {'type': 'LinearWarmupCosineAnnealing', 'total_steps': args.epochs * len(loader)}
    model.optim = {'optimizer': optimizer, 'scheduler': schedule, 'interval': 'step'}
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        devices=1,
        precision='32-true' if device.type == 'cpu' else 'bf16-mixed',
        callbacks=[TeacherStudentCallback(), ModelCheckpoint(args.out, 'last', enable_version_counter=False)],
        default_root_dir=args.out,
        logger=False,
    )
    last = args.out / 'last.ckpt'
    trainer.fit(model, loader, ckpt_path=last if last.exists() else None)

    normalization = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    export = mte.save_pretrained(model.backbone.teacher, args.out / 'export', **normalization)
    return Result(model.losses, export, model.backbone.teacher, model.dino_loss)


if __name__ == '__main__':
    main()
