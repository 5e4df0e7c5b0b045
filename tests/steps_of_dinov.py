"""Steps of DINOv2's or DINOv3's SSLMetaArch under FSDP, on fixed batches: NAME CONFIG OUT STOP [key=value ...]

Goes on from the host's own checkpoint in OUT and leaves one there, with all weights and the losses of its steps.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from run_on_cpu import dinov, prepare

IMAGES, LOCAL = 4, 2


def batch(step, rank, world):
    """What the host's collate function would give this process of the images of a step."""
    torch.manual_seed(step)
    mine = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    crops = {'global': torch.randn(2, IMAGES, 3, 32, 32), 'local': torch.randn(LOCAL, IMAGES, 3, 16, 16)}
    masks = (torch.rand(2, IMAGES, 16).argsort(-1) < 5)[:, mine].flatten(0, 1)
    return {
        **{f'collated_{name}_crops': x[:, mine].flatten(0, 1) for name, x in crops.items()},
        'collated_masks': masks,
        'mask_indices_list': masks.flatten().nonzero().flatten(),
        'masks_weight': torch.full((int(masks.sum()),), 1 / 5),
        'upperbound': int(masks.sum()),
        'n_masked_patches': torch.tensor([int(masks.sum())]),
        'global_batch_size': IMAGES,
    }


def build(name, cfg, shard=True):
    """The arch as the host's own main() makes it, or without its FSDP."""
    arch_of = __import__(f'{name}.train.ssl_meta_arch', fromlist=['SSLMetaArch']).SSLMetaArch
    torch.manual_seed(0)
    if name == 'dinov2':
        arch = arch_of(cfg)
        arch.need_to_synchronize_fsdp_streams = shard
        arch.prepare_for_distributed_training() if shard else arch.teacher.load_state_dict(arch.student.state_dict())
        return arch
    with torch.device('meta'):
        arch = arch_of(cfg)
    arch.prepare_for_distributed_training() if shard else arch.to_empty(device='cpu')
    arch._apply(lambda t: torch.full_like(t, float('nan') if t.is_floating_point() else 7))
    arch.init_weights()
    return arch


def main(name, config, out, stop, *options):
    from omegaconf import OmegaConf

    enable = __import__(f'{name}.distributed', fromlist=['enable']).enable
    enable(overwrite=True)
    rank, world, stop = dist.get_rank(), dist.get_world_size(), int(stop)
    package = __import__(f'{name}.configs', fromlist=['x'])
    default = package.dinov2_default_config if name == 'dinov2' else package.get_default_config()
    cfg = OmegaConf.merge(default, OmegaConf.load(config), OmegaConf.from_cli([f'train.output_dir={out}', *options]))
    arch = build(name, cfg)
    arch.train()
    groups = [{'params': group['params']} for group in arch.get_params_groups()]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)  # a step tells the gradient, unlike Adam's
    start, save = checkpoints(name, arch, optimizer, out)
    losses = []
    for step in range(start, stop):
        optimizer.zero_grad(set_to_none=True)
        before = {k: v.clone() for k, v in weights(arch.teacher).items()}
        found = arch.forward_backward(batch(step, rank, world), teacher_temp=0.05)
        found = found if name == 'dinov2' else found[1]
        losses.append({k: torch.as_tensor(v).float() for k, v in found.items() if 'loss' in k})
        [dist.all_reduce(v) for v in losses[-1].values()]
        for part in arch.student.values():
            clip = part.clip_grad_norm_ if name == 'dinov2' else None
            clip(3.0) if clip else torch.nn.utils.clip_grad_norm_(part.parameters(), 3.0)
        optimizer.step()
        (arch.update_teacher if name == 'dinov2' else arch.update_ema)(0.9)
    if stop > start:
        save(stop - 1)
    found = {'student': weights(arch.student), 'teacher': weights(arch.teacher), 'losses': losses, 'start': start}
    found['before'] = before if stop > start else {}
    if rank == 0:
        torch.save(found, Path(out, 'found.pt'))
        torch.save({'teacher': found['teacher']}, Path(out, 'teacher.pth'))


def weights(network):
    """All weights, gathered."""
    state = network.state_dict()
    return {k: (v.full_tensor() if hasattr(v, 'full_tensor') else v).clone() for k, v in state.items()}


def checkpoints(name, arch, optimizer, out):
    """The step to begin with, and what saves, by the host's own functions."""
    if name == 'dinov2':
        from dinov2.fsdp import FSDPCheckpointer

        checkpointer = FSDPCheckpointer(arch, out, optimizer=optimizer, save_to_disk=True)
        start = checkpointer.resume_or_load('', resume=True).get('iteration', -1) + 1
        return start, lambda step: checkpointer.save(f'model_{step}', iteration=step)
    from dinov3.checkpointer import find_latest_checkpoint, load_checkpoint, save_checkpoint

    folder, start = Path(out, 'ckpt'), 0
    if last := find_latest_checkpoint(folder):
        start = load_checkpoint(last, model=arch, optimizer=optimizer, strict_loading=False) + 1
    return start, lambda step: save_checkpoint(folder / str(step), iteration=step, model=arch, optimizer=optimizer)


if __name__ == '__main__':
    os.makedirs(sys.argv[3], exist_ok=True)
    prepare()
    dinov(sys.argv[1])
    main(*sys.argv[1:])
