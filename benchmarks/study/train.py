"""A run: a method trained from scratch, so that it can be killed at any time and goes on where it stopped.

Owns schedule, optimizer, order of the data and checkpoints. Knows nothing of what a method computes or how it is
evaluated.
"""

import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import timm
import torch
import torch.distributed as dist
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.common import schedule
from benchmarks.images import Images
from benchmarks.study.methods import ABLATIONS, METHODS, Method
from benchmarks.study.views import make_view

__all__ = ['MODELS', 'Run', 'identify', 'make_backbone', 'make_method', 'step_operations', 'step_times', 'train']


def small_vit(size: int) -> tuple[str, dict[str, Any]]:
    """4 blocks of width 96 over 7x7 patches of images of 28 pixels, and about as many of larger ones."""
    own = {'patch_size': max(4, size // 7), 'embed_dim': 96, 'depth': 4, 'num_heads': 3, 'dynamic_img_size': True}
    return 'vit_tiny_patch16_224', {'img_size': size, **own}


def small_swin(size: int) -> tuple[str, dict[str, Any]]:
    """2 stages of 2 blocks of width 48 and 96, windows of 7, over 14x14 patches of images of 28 pixels."""
    own = {'patch_size': max(2, size // 14), 'embed_dim': 48, 'depths': (2, 2), 'num_heads': (3, 6), 'window_size': 7}
    return 'swin_tiny_patch4_window7_224', {'img_size': size, **own}


def photo_vit(size: int, patch_size: int = 16, depth: int = 4, **kwargs: Any) -> tuple[str, dict[str, Any]]:
    """4 blocks of width 128 over patches of 16 pixels."""
    own = {'patch_size': patch_size, 'embed_dim': 128, 'depth': depth, 'num_heads': 4, 'dynamic_img_size': True}
    return 'vit_tiny_patch16_224', {'img_size': size, **own, **kwargs}


MODELS = {
    'vit': small_vit,
    'swin': small_swin,
    'photo_vit': photo_vit,
    'photo_vit_4': partial(photo_vit, patch_size=4),
    'photo_vit_12': partial(photo_vit, patch_size=12),
    'photo_vit_12_mean': partial(photo_vit, patch_size=12, global_pool='avg'),
    'photo_vit_12_deep': partial(photo_vit, patch_size=12, depth=10),
}


class Run(NamedTuple):
    """All that decides the outcome of a run, but for the images."""

    method: str
    mte: Optional[dict[str, Any]]  # options of mte.wrap, None for the plain method
    seed: int = 0
    epochs: int = 10
    model: str = 'vit'  # of MODELS, or a name in timm
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    settings: Optional[dict[str, Any]] = None  # of the method
    precision: str = 'bfloat16'  # of steps, by autocast; or float32, in which networks are evaluated
    variant: str = ''  # what the tables call it

    @property
    def name(self) -> str:
        """Of its line and its files, without spaces."""
        variant = self.variant or ('plain' if self.mte is None else 'mte')
        return f'{self.method}-{re.sub("[^a-z0-9.]+", "-", variant.lower())}-seed{self.seed}'


def make_backbone(run: Run, images: Images, classes: int = 0) -> Any:
    """The timm model of ``run``; but for a classifier the same weights for the same seed, whatever the method."""
    torch.manual_seed(run.seed)
    overlay = {'mean': images.mean, 'std': images.std}
    common = {'num_classes': 0, 'in_chans': images.channels, 'pretrained_cfg_overlay': overlay}
    if drop_path := (run.settings or {}).get('drop_path'):
        common['drop_path_rate'] = drop_path
    if run.model in MODELS:
        name, kwargs = MODELS[run.model](images.size)
        model: Any = timm.create_model(name, **common, **kwargs)
    else:
        for kwargs in ({'img_size': images.size, 'dynamic_img_size': True}, {'img_size': images.size}, {}):
            try:
                model = timm.create_model(run.model, **common, **kwargs)
                break
            except TypeError:  # not all architectures take them
                if not kwargs:
                    raise
    if classes:
        model.reset_classifier(classes)
    return model


class Order:
    """A shuffled order of the images that depends on seed and epoch alone.

    With several processes each takes every ``world``-th image.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.epoch = 0

    @property
    def batches(self) -> int:
        return self.length // (self.batch_size * self.world)

    def indices(self) -> torch.Tensor:
        """(batches, batch_size), of this process."""
        generator = torch.Generator().manual_seed(10_000 * self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        count = self.batches * self.batch_size
        return order[self.rank : count * self.world : self.world].view(self.batches, self.batch_size)


class Feed:
    """Batches of views and labels on ``device``; views are drawn anew by seed, epoch and number of the batch."""

    def __init__(self, run: Run, images: Images, method: Method, device: str) -> None:
        pixels, self.labels = images.pixels('train', images.train_side)
        self.order = Order(len(pixels), run.batch_size, run.seed)
        self.on_device = device.startswith('cuda')
        self.pixels = pixels.to(device) if self.on_device else pixels
        self.views, self.images, self.run, self.device = method.views(images.size), images, run, device

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """The batches of an epoch from the ``skip``-th on."""
        self.order.epoch = epoch
        dtype = getattr(torch, self.run.precision)
        for i, indices in enumerate(self.order.indices()):
            if i < skip:
                continue
            seed_everything(self.run.seed, epoch, self.order.rank, i)
            batch = self.pixels[indices.to(self.pixels.device)]
            views = [make_view(batch, view, self.images.mean, self.images.std, dtype) for view in self.views]
            yield views, self.labels[indices].to(self.device)


def train(
    run: Run,
    images: Images,
    folder: Path,
    device: str = 'cpu',
    save_every: float = 120,
    watch: Optional[Callable[[Method, int], Any]] = None,
    watch_every: int = 1,
    until: float = math.inf,
) -> tuple[Method, dict[str, Any]]:
    """Trains ``run``, or what is left of it.

    Args:
        run: What to train.
        images: Its images.
        folder: Holds the checkpoint, which is written each ``save_every`` seconds and after each epoch.
        device: For model and views. Views are drawn by seed, epoch and number of the batch, so that a resumed run is
            the same to the bit.
        save_every: Seconds between checkpoints.
        watch: Called with the method and how many epochs it had, after every ``watch_every``; what it returns is kept.
            It must not train.
        watch_every: Epochs; the last one is always watched.
        until: Leave with a checkpoint at this time of ``time.monotonic``.

    Returns:
        The method, and its state: ``step``, ``seconds`` of training without views and ``reading`` of these, ``losses``
        of each step, ``watched`` with its epoch and seconds.
    """
    method: Any = make_method(run, images).to(device).train()
    feed = Feed(run, images, method, device)
    order = feed.order
    if not order.batches:
        sys.exit(f'error: {order.length} training images, fewer than {order.world} x {run.batch_size}, a batch')
    if dist.is_initialized() and device.startswith('cuda'):
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    optimizer = make_optimizer(run, method)
    path = folder / f'{run.name}.pt'
    identity = identify(run, images)
    state: dict[str, Any] = {'step': 0, 'seconds': 0.0, 'reading': 0.0, 'losses': [], 'watched': []}
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved['identity'] != identity:
            sys.exit(f'error: {path} is of other settings or images; remove it, or choose another --checkpoints')
        method.load_state_dict(saved['method'])
        for name, buffer in saved['buffers'].items():  # lightly's memory bank is in no state dict
            owner, _, own = name.rpartition('.')
            method.get_submodule(owner)._buffers[own] = buffer
        optimizer.load_state_dict(saved['optimizer'])
        state = saved['state']
    runs: Any = method
    if dist.is_initialized():
        runs = DistributedDataParallel(method, broadcast_buffers=False)
    total = run.epochs * order.batches
    if dist.is_initialized():  # whose clocks differ
        until = math.inf
    last_saved = time.perf_counter()
    with tqdm(total=total, initial=state['step'], desc=run.name, unit='step', leave=False, file=sys.stderr) as bar:
        while state['step'] < total:
            epoch, skip = divmod(state['step'], order.batches)
            began = time.perf_counter()
            for views, labels in feed.epoch(epoch, skip):
                synchronize(device)
                read = time.perf_counter()
                state['reading'] += read - began
                for group in optimizer.param_groups:
                    group['lr'] = run.lr * group['lr_scale'] * schedule(state['step'], total)
                with stepping(method, run, device):
                    loss = runs(views, labels, epoch)
                if not loss.isfinite():
                    sys.exit(f'error: {run.name}: the loss is {loss.item()} at step {state["step"]}; try a lower lr')
                update(method, optimizer, loss, epoch, state['step'] / total)
                state['losses'].append(loss.item())
                state['seconds'] += time.perf_counter() - read
                state['step'] += 1
                bar.update()
                due = time.perf_counter() - last_saved > save_every and state['step'] % order.batches
                if due or time.monotonic() > until:
                    save(path, identity, method, optimizer, state)
                    last_saved = time.perf_counter()
                if time.monotonic() > until and state['step'] % order.batches:
                    sys.exit(f'{run.name}: stopped at step {state["step"]} of {total}; the same command goes on')
                began = time.perf_counter()
            if watch is not None and not order.rank and (not (epoch + 1) % watch_every or epoch + 1 == run.epochs):
                seconds = state['seconds'] + state['reading']
                state['watched'].append({'epoch': epoch + 1, 'seconds': seconds, **watch(method, epoch + 1)})
                method.train()
            save(path, identity, method, optimizer, state)  # with what was watched, or neither
    return method, state


def identify(run: Run, images: Images) -> str:
    """All that decides the outcome of a run, the method's defaults included, as JSON."""
    settings = {**ABLATIONS, **METHODS[run.method].defaults, **(run.settings or {})}
    return json.dumps({'run': run._asdict(), 'images': images.identity(), 'settings': settings}, sort_keys=True)


def make_method(run: Run, images: Images) -> Method:
    """The untrained method of ``run``."""
    kind = METHODS[run.method]
    backbone = make_backbone(run, images, count_classes(images) if kind.classifies else 0)
    return kind(backbone, run.mte, **(run.settings or {}))


def make_optimizer(run: Run, method: Method) -> Any:
    groups: list[dict[str, Any]] = []
    for module in learning(method):
        scale = method.settings.get('predictor_lr', 1.0) if module is getattr(method, 'predictors', None) else 1.0
        groups += [{**g, 'lr_scale': scale} for g in param_groups_weight_decay(module, run.weight_decay)]
    return torch.optim.AdamW(groups, lr=run.lr)


@contextmanager
def stepping(method: Method, run: Run, device: str) -> Iterator[None]:
    """The precision of a training step's forward pass."""
    kind = torch.device(device).type
    fused = []
    if run.precision == 'bfloat16' and kind == 'cpu':  # where fused attention's backward is six times that of float32
        fused = [m for m in method.modules() if getattr(m, 'fused_attn', False)]
    try:
        for module in fused:
            module.fused_attn = False
        with torch.autocast(kind, torch.bfloat16, enabled=run.precision == 'bfloat16'):
            yield
    finally:
        for module in fused:
            module.fused_attn = True


def update(method: Method, optimizer: Any, loss: torch.Tensor, epoch: int, progress: float) -> None:
    """What follows the loss of a step."""
    optimizer.zero_grad()
    loss.backward()
    method.before_step(epoch)
    nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g['params']), 3.0)
    optimizer.step()
    method.after_step(progress)


def step_times(
    runs: list[Run], images: Images, device: str = 'cpu', rounds: int = 12
) -> tuple[list[list[float]], list[int], list[float]]:
    """Seconds of steps of several runs, which take turns; how many parameters learn; and seconds of their views."""
    methods: list[Any] = [make_method(run, images).to(device).train() for run in runs]
    optimizers = [make_optimizer(run, method) for run, method in zip(runs, methods)]
    feed = Feed(runs[0], images, methods[0], device)
    times: list[list[float]] = [[] for _ in runs]
    reading = []
    for number in range(rounds + 2):  # two to warm up
        began = time.perf_counter()
        views, labels = next(feed.epoch(number))
        synchronize(device)
        reading.append(time.perf_counter() - began)
        for run, method, optimizer, own in zip(runs, methods, optimizers, times):
            synchronize(device)
            began = time.perf_counter()
            with stepping(method, run, device):
                loss = method(views, labels, 1)
            update(method, optimizer, loss, 1, 0.5)
            synchronize(device)
            if number > 1:
                own.append(time.perf_counter() - began)
    return times, [sum(p.numel() for g in o.param_groups for p in g['params']) for o in optimizers], reading[2:]


def step_operations(run: Run, images: Images) -> float:
    """Billions of multiply-adds of a step, backward pass included, for each image of the batch."""
    method = make_method(run, images).train()
    views, labels = next(Feed(run, images, method, 'cpu').epoch(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        method(views, labels, 1).backward()
    operations: float = counter.get_total_flops() / 2e9 / len(labels)
    return operations


def synchronize(device: str) -> None:
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def learning(method: Method) -> list[nn.Module]:
    """The parts of ``method`` that learn."""
    return [m for m in method.children() if any(p.requires_grad for p in m.parameters())]


def seed_everything(seed: int, epoch: int, rank: int, batch: int) -> None:
    """Views draw from torch's generator, lightly's masks from the others too."""
    number = ((seed * 1009 + epoch) * 100_003 + batch) * 64 + rank
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def save(path: Path, identity: str, method: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    if dist.is_initialized() and dist.get_rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    buffers = dict(method.named_buffers())
    everything = {
        'identity': identity,
        'method': method.state_dict(),
        'buffers': buffers,
        'optimizer': optimizer.state_dict(),
        'state': state,
    }
    torch.save(everything, temporary)
    temporary.replace(path)


def count_classes(images: Images) -> int:
    return int(images.pixels('train', images.train_side)[1].max()) + 1
