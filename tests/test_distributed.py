"""Two processes on the CPU (gloo) against one with the joined batch: DDP and FSDP2, compiled and checkpointed or not.

A DINO training step in float64: multi-crop, heads with a shared prototype layer, a centre, an EMA teacher, AdamW.
"""

import copy
import os
import tempfile

import lookalikes as like
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import zoo
from torch.nn.parallel import DistributedDataParallel

import mte_timm as mte

STEPS, BATCH = 3, 8
# model: (name in the zoo, sizes of the views)
MODELS = {
    'vit': ('plain', (32, 16)),
    'dinov3': ('dinov3', (None,)),
    'swin': ('swin', (None,)),
    'ssl_vit': (None, (32, 16)),
}
RUNS = [
    ('vit', 'ddp', False, False),
    ('vit', 'ddp', True, True),
    ('vit', 'fsdp2', False, False),
    ('vit', 'fsdp2', False, True),
    ('vit', 'fsdp2', True, False),
    ('dinov3', 'ddp', False, False),
    ('dinov3', 'fsdp2', False, True),
    ('swin', 'ddp', False, True),
    ('swin', 'fsdp2', False, False),
    ('ssl_vit', 'ddp', False, False),
    ('ssl_vit', 'fsdp2', False, False),
]
try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch before 2.6
    RUNS = [run for run in RUNS if run[1] == 'ddp']
MODELS = {k: v for k, v in MODELS.items() if v[0] is None or timm.is_model(zoo.ALL[v[0]][0])}
RUNS = [run for run in RUNS if run[0] in MODELS]
OLD_COMPILER = torch.__version__ < '2.6'  # what it needs is in docs/faq.md


def head(dim):
    return like.Head(dim, 16)


def build(name):
    torch.manual_seed(0)
    if name == 'ssl_vit':
        student = mte.wrap(like.ViT().double(), head=head)
    else:
        key = MODELS[name][0]
        kwargs = {'dynamic_img_size': True} if key == 'plain' else {}
        student = mte.wrap(zoo.build(key, drop_path_rate=0.0, **kwargs).double(), head=head, **zoo.counts(key))
    return student, copy.deepcopy(student).requires_grad_(False)


def views(name):
    """Two views of the first size and two of the second, the same for all."""
    torch.manual_seed(1)
    _, sizes = MODELS[name]
    whole = zoo.image_size(build(name)[0].backbone)[1:] if None in sizes else None
    shapes = [whole if s is None else (s, s) for s in sizes for _ in range(2)]
    return [[torch.randn(BATCH, 3, *shape, dtype=torch.float64) for shape in shapes] for _ in range(STEPS)]


def shard(model, how):
    if how == 'ddp':
        return DistributedDataParallel(model)
    mesh = dist.device_mesh.init_device_mesh('cpu', (dist.get_world_size(),))
    if type(model.adapter).__name__ in ('ViTAdapter', 'EvaAdapter'):  # their blocks are called, so gathered, one by one
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)  # the teacher has no backward to do it


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def train(name, how, compiled, checkpointed, batches, after_step=lambda model: None):
    """Losses of the steps, and student and teacher afterwards."""
    student, teacher = build(name)
    if checkpointed:
        student.set_grad_checkpointing()
    models = student, teacher
    if how is not None:
        student = shard(student, how)
        teacher = shard(teacher, how) if how == 'fsdp2' else teacher
    run = torch.compile(student, backend='aot_eager', dynamic=False if OLD_COMPILER else None) if compiled else student
    criterion = mte.MTELoss(like.CentredLoss(16, len(batches[0])).double())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for crops in batches:
        loss = criterion(run(crops), teacher(crops[:2]), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for s, t in zip(models[0].parameters(), models[1].parameters()):
                t.mul_(0.9).add_(s, alpha=0.1)
        if how is not None:
            dist.all_reduce(mean := loss.detach().clone())
            loss = mean / dist.get_world_size()
        losses.append(loss.item())
        after_step(models[0])
    return losses, *models, criterion


def in_sync(model):
    """Every parameter, auxiliary ones included, is the same in all processes."""
    for name, p in model.named_parameters():
        mine = full(p.detach())
        dist.broadcast(theirs := mine.clone(), src=0)
        assert torch.equal(mine, theirs), name


def worker(rank, folder, runs):
    torch.set_num_threads(1)
    if OLD_COMPILER:
        torch._dynamo.config.optimize_ddp = False
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    for i, run in enumerate(runs):
        batches = [[v.chunk(2)[rank] for v in crops] for crops in views(run[0])]
        losses, student, teacher, criterion = train(*run, batches, in_sync)
        state = {k: full(v) for k, v in teacher.state_dict().items()}
        if rank == 0:
            parameters = {n: full(p.detach()) for n, p in student.named_parameters()}
            saved = {'losses': losses, 'parameters': parameters, 'teacher': state, 'center': criterion.criterion.center}
            torch.save(saved, f'{folder}/{i}.pt')
        else:
            [full(p.detach()) for p in student.parameters()]  # gathering takes part in all processes
    dist.barrier()  # one that leaves early can hang the other
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def results():
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (folder, RUNS), nprocs=2)
        yield {run: f'{folder}/{i}.pt' for i, run in enumerate(RUNS)}


@pytest.fixture(scope='module')
def alone():
    return {name: train(name, None, False, False, views(name)) for name in MODELS}


@pytest.mark.parametrize('run', RUNS, ids=lambda run: '-'.join(map(str, run)))
def test_two_processes_equal_one(run, results, alone):
    ours, (losses, student, teacher, criterion) = torch.load(results[run]), alone[run[0]]
    print(f'{run}: one process {losses}, two {ours["losses"]}')
    assert ours['losses'] == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(ours['center'], criterion.criterion.center, rtol=1e-9, atol=1e-12)
    expected = dict(student.named_parameters())
    assert ours['parameters'].keys() == expected.keys()
    for name, p in expected.items():  # AdamW divides by roots of squared gradients, near zero where they are
        torch.testing.assert_close(ours['parameters'][name], p.detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert ours['teacher'].keys() == teacher.state_dict().keys()


@pytest.mark.parametrize('run', [r for r in RUNS if r[0] == 'vit'], ids=lambda run: '-'.join(map(str, run)))
def test_gathered_state_becomes_a_timm_model(run, results, tmp_path):
    zoo.needs_local_dir()
    state = torch.load(results[run])['teacher']
    torch.save({'teacher': state}, tmp_path / 'checkpoint.pth')
    backbone = build('vit')[0].backbone
    name, kwargs = zoo.ATTENDING['plain']
    report = mte.strip_checkpoint(tmp_path / 'checkpoint.pth', name, dynamic_img_size=True, **kwargs)
    backbone.load_state_dict({k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')})
    folder = mte.save_pretrained(report.model, tmp_path / 'export', mean=(0.5,) * 3, std=(0.5,) * 3, model_args=kwargs)
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = zoo.images(backbone, 2)
    torch.testing.assert_close(loaded(x), backbone.float().eval()(x))
