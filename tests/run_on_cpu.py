"""Runs a script of an SSL repository, made for NCCL and CUDA, on the CPU: python run_on_cpu.py SCRIPT [ARGUMENTS]

Images are made smaller, so that a step takes a fraction of a second. The repository itself stays as it is. Environment:
OLD_TIMM=1 and OLD_FSDP=1 supply what the patches of MoCo v3 and MoBY, and of DINOv2, do, for a run without them.
SAME_FOR_ANY_WORLD=1 makes random transforms a function of the image, drops no path and computes in float32, so that one
and two processes do the same.
"""

import importlib
import os
import random
import runpy
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms as T
from torch import nn
from torch.distributed.nn.functional import all_reduce

SIZES = {224: 64, 96: 32, 256: 64}


def smaller(size):
    return SIZES.get(size, size) if isinstance(size, int) else size


def unless_cuda(function):
    """``function`` without device='cuda'."""
    return lambda *args, device=None, **kwargs: function(*args, **kwargs)


def sync_batch_norm(self, x):
    """SyncBatchNorm's own forward, which refuses the CPU, by all-reduce of sums."""
    if not self.training:
        statistics = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, *statistics, self.weight, self.bias, False, 0, self.eps)
    x, dims = x.float(), [0, *range(2, x.ndim)]
    count = x.numel() // x.shape[1] * dist.get_world_size()
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean = all_reduce(x.sum(dims)) / count
    var = all_reduce((x - mean.view(shape)).square().sum(dims)) / count
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
    x = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
    return x if self.weight is None else x * self.weight.view(shape) + self.bias.view(shape)


def prepare() -> None:
    random.seed(0)  # which DINO and iBOT leave to chance
    torch.set_num_threads(int(os.environ.get('THREADS', '2')))
    for name in ('set_device', 'synchronize', 'empty_cache'):
        setattr(torch.cuda, name, lambda *a: None)
    torch.cuda.is_available = lambda: 'moco' in sys._getframe(1).f_code.co_filename  # torch itself must not believe it
    torch.cuda.device_count = lambda: 1
    torch.cuda.max_memory_allocated = lambda: 0
    torch.cuda.amp.autocast = lambda enabled=True: torch.autocast('cpu', torch.bfloat16, enabled=enabled)
    torch.cuda.amp.GradScaler = partial(torch.amp.GradScaler, 'cpu')
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *a, **k: self
    torch.tensor = unless_cuda(torch.tensor)
    torch.load = partial(torch.load, map_location='cpu')
    load = torch.load
    torch.load = lambda *a, map_location=None, **k: load(*a, **k)
    torch.hub.list = lambda *a, **k: []  # DINO asks the network for XCiT
    torch.multiprocessing.spawn = lambda function, nprocs, args: function(0, *args)

    init, loader, ddp = dist.init_process_group, torch.utils.data.DataLoader, nn.parallel.DistributedDataParallel
    dist.init_process_group = lambda backend=None, **k: init('gloo', **k)

    class DataLoader(loader):
        def __init__(self, *args, pin_memory=False, **kwargs):
            super().__init__(*args, **kwargs)

    torch.utils.data.DataLoader = DataLoader

    class DistributedDataParallel(ddp):
        def __init__(self, module, device_ids=None, **kwargs):
            super().__init__(module, **kwargs)

        def _passing_sync_batchnorm_handle(self, module):  # refuses SyncBatchNorm on the CPU
            pass

    nn.parallel.DistributedDataParallel = DistributedDataParallel
    nn.SyncBatchNorm.forward = sync_batch_norm
    for crop in ('RandomResizedCrop', 'Resize', 'CenterCrop'):
        made = getattr(T, crop)
        setattr(T, crop, lambda size, *a, made=made, **k: made(smaller(size), *a, **k))


def on_cpu(function):
    """``function`` with device='cpu' where it is given another."""
    return lambda *args, device='cpu', **kwargs: function(*args, device='cpu', **kwargs)


def add_small_vit(name: str) -> None:
    vits = importlib.import_module(f'{name}.models.vision_transformer')
    attention = {} if name == 'dinov3' else {'block_fn': partial(vits.Block, attn_class=vits.MemEffAttention)}
    vits.vit_tiny = partial(vits.DinoVisionTransformer, embed_dim=48, depth=4, num_heads=3, **attention)


def dinov(name: str) -> None:
    """DINOv2 and DINOv3: FSDP on the CPU, pictures of an ImageFolder, a ViT of their class that is small."""
    from torch.distributed import device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torchvision.datasets import ImageFolder

    to, fsdp, all_reduce = nn.Module.to, FullyShardedDataParallel.__init__, dist.all_reduce
    nn.Module.to = lambda self, device, *a, **k: self if str(device) == 'cuda' else to(self, device, *a, **k)
    nn.Module.to_empty = on_cpu(nn.Module.to_empty)
    nn.Module.compile = lambda self, *a, **k: None
    torch.full_like = on_cpu(torch.full_like)
    init_mesh, from_group = device_mesh.init_device_mesh, device_mesh.DeviceMesh.from_group
    device_mesh.init_device_mesh = lambda device, *a, **k: init_mesh('cpu', *a, **k)
    device_mesh.DeviceMesh.from_group = lambda group, device, *a, **k: from_group(group, 'cpu', *a, **k)

    def averaging(tensor, op=dist.ReduceOp.SUM, **kwargs):  # which gloo cannot
        done = all_reduce(tensor, dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op, **kwargs)
        return tensor.div_(dist.get_world_size()) if op == dist.ReduceOp.AVG else done

    def shard(self, module, device_id, sync_module_states, **kwargs):  # a sync that refuses the CPU
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)
        fsdp(self, module, device_id=torch.device('cpu'), **kwargs)

    dist.all_reduce, FullyShardedDataParallel.__init__ = averaging, shard
    gather = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda out, t, **k: gather(out, t.view(-1) if t.ndim == 0 else t, **k)
    if name == 'dinov2':
        import xformers_stub  # noqa: F401
    loaders = importlib.import_module(f'{name}.data.loaders')
    loaders.ImageNet = lambda transforms=None, **k: ImageFolder(**k)
    add_small_vit(name)
    if os.environ.get('OLD_FSDP'):
        importlib.import_module('dinov2.fsdp')
        importlib.import_module('mte_timm.integrations.old_fsdp')


def old_timm() -> None:
    import timm.scheduler.cosine_lr as cosine_lr
    from timm.models import VisionTransformer

    from mte_timm.integrations.old_timm import tolerant

    VisionTransformer.num_tokens = 1
    cosine_lr.CosineLRScheduler = tolerant(cosine_lr.CosineLRScheduler)


def same_for_any_world() -> None:
    torch.cuda.amp.autocast = lambda enabled=True: torch.autocast('cpu', enabled=False)

    def hook(module, args, output):
        kind = type(module).__name__
        if hasattr(module, 'contrastive_loss'):  # MoCo v3 and MoBY print the loss of the first process alone
            mean = all_reduce(output.detach()) / dist.get_world_size()
            sys.stderr.write(f'mean loss {mean.item():.7f}\n' if dist.get_rank() == 0 else '')
        return args[0] if kind == 'DropPath' else None

    nn.modules.module.register_module_forward_hook(hook)
    compose = T.Compose.__call__

    def seeded(self, image):
        if hasattr(image, 'tobytes'):
            seed = zlib.crc32(image.tobytes())
            torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        return compose(self, image)

    T.Compose.__call__ = seeded


def shrink(folder: Path) -> None:
    """MoCo v3's ViTs take images of one size only."""
    if (folder / 'vits.py').exists():
        vits = importlib.import_module('vits')
        vits.vit_small = partial(vits.vit_small, img_size=64)


if __name__ == '__main__':
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    prepare()
    if os.environ.get('OLD_TIMM'):
        old_timm()
    if os.environ.get('SAME_FOR_ANY_WORLD'):
        same_for_any_world()
    shrink(script.parent)
    if script.parts[-3] in ('dinov2', 'dinov3'):
        sys.path.insert(0, str(Path(__file__).parent))
        dinov(script.parts[-3])
    runpy.run_path(str(script), run_name='__main__')
