"""Two processes on the CPU: gradients agree, every parameter takes part."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mte_timm as mte

MODELS = ('plain', 'dinov3', 'swin')


def head(dim):
    return nn.Linear(dim, 5)


def build(name):
    torch.manual_seed(0)
    return mte.wrap(zoo.build(name, drop_path_rate=0.0).double(), head=head, **zoo.counts(name))


def gradients(model, images):
    out = model(images)
    mte.MTELoss(nn.MSELoss())(out, out).backward()
    return {n.removeprefix('module.'): p.grad for n, p in model.named_parameters()}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    for name in MODELS:
        model = DistributedDataParallel(build(name))
        images = torch.load(f'{folder}/{name}.pt')
        torch.save(gradients(model, images.chunk(2)[rank]), f'{folder}/{name}-{rank}.pt')
    dist.destroy_process_group()


def test_ddp_equals_one_process_with_the_joined_batch():
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            torch.save(zoo.images(build(name).backbone, 4, dtype=torch.float64), f'{folder}/{name}.pt')
        mp.spawn(worker, (folder,), nprocs=2)
        for name in MODELS:
            expected = gradients(build(name), torch.load(f'{folder}/{name}.pt'))
            for rank in range(2):
                ours = torch.load(f'{folder}/{name}-{rank}.pt')
                assert ours.keys() == expected.keys()
                for key, grad in expected.items():
                    torch.testing.assert_close(ours[key], grad, rtol=1e-9, atol=1e-12, msg=f'{name} {key}')
