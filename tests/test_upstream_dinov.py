"""DINOv2 and DINOv3 with their patches, on the CPU: their own train.py, and their SSLMetaArch step by step.

Runs where MTE_UPSTREAM names a folder with clones of facebookresearch/dinov2 and dinov3; see test_upstream.py.
"""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import slow_form
import steps_of_dinov as steps
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_upstream import UPSTREAM, assert_same, export, free_port, images  # noqa: F401  # a fixture
from torch import nn

import mte_timm as mte

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip('omegaconf')
pytest.importorskip('fvcore')
from omegaconf import OmegaConf  # noqa: E402

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not UPSTREAM, reason='MTE_UPSTREAM names no folder with clones of the SSL repositories'),
]

HEAD = 'head_n_prototypes: 64, head_bottleneck_dim: 16, head_hidden_dim: 32'
CONFIG = f"""
dino: {{{HEAD}}}
ibot: {{{HEAD}}}
train: {{batch_size_per_gpu: 4, num_workers: 0, OFFICIAL_EPOCH_LENGTH: 2}}
optim: {{epochs: 2, warmup_epochs: 0, freeze_last_layer_epochs: 0}}
teacher: {{warmup_teacher_temp_epochs: 1, momentum_teacher: 0.9, final_momentum_teacher: 0.9}}
crops: {{global_crops_size: 32, local_crops_size: 16, local_crops_number: {steps.LOCAL}}}
evaluation: {{eval_period_iterations: 2}}
"""
FP32 = '{mixed_precision: {param_dtype: fp32, reduce_dtype: fp32}}'
CONFIGS = {
    'dinov2': f"""{CONFIG}
student: {{arch: vit_tiny, patch_size: 8, drop_path_rate: 0.2, layerscale: 0.1, block_chunks: 2,
  num_register_tokens: 2}}
compute_precision:
  grad_scaler: false
  student: &all {{backbone: {FP32}, dino_head: {FP32}, ibot_head: {FP32}}}
  teacher: *all
""",
    'dinov3': CONFIG.replace('num_workers: 0', 'num_workers: 0, compile: false')
    + """
student: {arch: vit_tiny, patch_size: 8, drop_path_rate: 0.2, layerscale: 0.1, norm_layer: layernormbf16,
  n_storage_tokens: 2, mask_k_bias: true, untie_global_and_local_cls_norm: true, pos_embed_rope_rescale_coords: 2}
compute_precision: {param_dtype: fp32}
checkpointing: {period: 2}
""",
}
MTE = ('mte.n_cls=3', 'mte.n_pool=2', 'mte.kernel_size=3')


# --- the repositories, and their train.py


@pytest.fixture(scope='module', params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope='module')
def patched(name, tmp_path_factory):
    return clone(name, tmp_path_factory.mktemp(name), patched=True)


def clone(name, folder, patched):
    folder.mkdir(exist_ok=True)
    (folder / 'small.yaml').write_text(CONFIGS[name])
    return export(SimpleNamespace(repository=name, patch=name), folder, patched)


def run(name, repository, out, *options, script=None, world=1, environment=None, fails=False):
    """Runs train.py, or another script, in ``world`` processes; what the first printed."""
    script = script or [ROOT / 'tests' / 'run_on_cpu.py', repository / name / 'train' / 'train.py']
    before = ['--config-file', repository / 'small.yaml', '--output-dir', out]
    if script[0].name != 'run_on_cpu.py':
        before = [name, repository / 'small.yaml', out]
    port, processes = free_port(), []
    for rank in range(world):
        variables = {
            **{'RANK': rank, 'WORLD_SIZE': world, 'LOCAL_RANK': 0, 'LOCAL_WORLD_SIZE': 1, 'THREADS': 1},
            **{'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'GLOO_SOCKET_IFNAME': 'lo', 'TORCHELASTIC_RUN_ID': 'x'},
            **{'PYTHONPATH': f'{ROOT}:{repository}', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': 1, **(environment or {})},
        }
        command = [sys.executable, '-W', 'ignore', *script, *before, *options]
        processes.append(
            subprocess.Popen(
                list(map(str, command)), cwd=repository, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, **{k: str(v) for k, v in variables.items()}},
            )
        )  # fmt: skip
    printed = [p.communicate()[0] for p in processes]
    for process, text in zip(processes, printed):
        assert (process.returncode != 0) == fails, text[-3000:]
    return printed[0]


@pytest.fixture(scope='module')
def data(images):  # noqa: F811
    return f'train.dataset_path=ImageNet:root={images}/train'


@pytest.fixture(scope='module')
def trained(name, patched, data, tmp_path_factory):
    """Two epochs of two steps with the key, the second after a resume."""
    out = tmp_path_factory.mktemp('trained')
    run(name, patched, out, data, *MTE, 'optim.epochs=1')
    run(name, patched, out, data, *MTE)
    return out


def metrics(out):
    return [json.loads(line) for line in (out / 'training_metrics.json').read_text().splitlines()]


def checkpoint(name, out):
    """The host's last checkpoint, optimizer included, as one process saves it."""
    if name == 'dinov2':
        return torch.load(out / 'model_final.rank_0.pth', weights_only=False)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    last = max((out / 'ckpt').glob('*'), key=lambda p: int(p.name))
    dcp_to_torch_save(last, out / 'ckpt.pth')
    return torch.load(out / 'ckpt.pth', weights_only=False)


def test_without_the_key_nothing_changes(name, patched, data, tmp_path):
    plain = clone(name, tmp_path / 'clone', patched=False)
    old = {'OLD_FSDP': '1'} if name == 'dinov2' else {}
    run(name, plain, tmp_path / 'a', data, environment=old)
    run(name, patched, tmp_path / 'b', data)
    assert_same(checkpoint(name, tmp_path / 'a'), checkpoint(name, tmp_path / 'b'))
    a, b = (metrics(tmp_path / x) for x in 'ab')
    assert len(a) == 2
    for one, other in zip(a, b):
        assert {k: v for k, v in one.items() if 'time' not in k} == {k: other[k] for k in one if 'time' not in k}
    # and a folder of such a run is refused with the key, whatever is in it
    text = run(name, patched, tmp_path / 'b', data, *MTE, 'optim.epochs=3', fails=True)
    assert 'is of a run without it' in text or 'they are of a run without it' in text, text[-2000:]


def test_train_py_trains_and_resumes(name, trained):
    values = [entry['total_loss'] for entry in metrics(trained)]
    assert [entry['iteration'] for entry in metrics(trained)] == [0, 1, 3]  # it logs a run's first and last steps
    assert torch.tensor(values).isfinite().all()
    assert all(entry['mte_global_crops_loss'] > 0 < entry['mte_local_crops_loss'] for entry in metrics(trained))


# --- their SSLMetaArch, in this process


@pytest.fixture(scope='module')
def arch_of(name, patched, tmp_path_factory):
    """Builds an SSLMetaArch without FSDP from options, with parameters that tell student and teacher apart."""
    kept, path = dict(sys.modules), list(sys.path)
    sys.path.insert(0, str(patched))
    import run_on_cpu

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, 'cuda', lambda self, *a, **k: self)
        patch.setattr(nn.Module, 'compile', lambda self, *a, **k: None)
        if name == 'dinov2':
            import xformers_stub  # noqa: F401
        run_on_cpu.add_small_vit(name)
        store = tmp_path_factory.mktemp('store') / 'store'
        dist.init_process_group('gloo', init_method=f'file://{store}', rank=0, world_size=1)
        configs = __import__(f'{name}.configs', fromlist=['x'])
        default = configs.dinov2_default_config if name == 'dinov2' else configs.get_default_config()

        def build(*options):
            cfg = OmegaConf.merge(default, OmegaConf.create(CONFIGS[name]), OmegaConf.from_cli(list(options)))
            arch = steps.build(name, cfg, shard=False)
            with torch.no_grad():
                for key, p in [*arch.student.named_parameters('student'), *arch.teacher.named_parameters('teacher')]:
                    p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
            arch.train()
            arch.optimized = []
            arch.backprop_loss = lambda loss: (arch.optimized.append(loss.detach()), loss.backward())
            return arch

        yield build
        dist.destroy_process_group()
    sys.path[:] = path
    for module in [m for m in sys.modules if m not in kept and m.split('.')[0] in (name, 'xformers', 'xformers_stub')]:
        del sys.modules[module]


@pytest.fixture
def build(arch_of):
    return arch_of


@pytest.fixture
def build_v3(arch_of, name):
    if name != 'dinov3':
        pytest.skip('of DINOv3')
    return arch_of


def step(arch, seed=0):
    """The host's step; losses by name."""
    torch.manual_seed(seed)
    found = arch.forward_backward(steps.batch(seed, 0, 1), teacher_temp=0.05)
    return found if isinstance(found, dict) else found[1]


def own_tokens(arch):
    """All that the backbones say of their own tokens, in training and evaluation, and the random state after it."""
    x = steps.batch(0, 0, 1)
    crops, masks = [x['collated_global_crops'], x['collated_local_crops']], [x['collated_masks'], None]
    torch.manual_seed(1)
    student, teacher = arch.student['backbone'], arch.teacher['backbone']
    outs = [*student(crops, masks=masks, is_training=True), student(crops[0], masks=masks[0], is_training=True)]
    with torch.no_grad():
        outs.append(teacher(crops[0], is_training=True))
    own = [{k: v for k, v in out.items() if k not in ('masks', 'x_norm_mte')} for out in outs]
    return own, torch.get_rng_state(), teacher(crops[1])


VARIANTS = {
    'dinov2': {
        'chunks of FSDP': ('student.block_chunks=4', 'student.num_register_tokens=0'),
        'no chunks, registers': ('student.block_chunks=0', 'student.num_register_tokens=4'),
        'little drop-path': ('student.drop_path_rate=0.05', 'student.drop_path_uniform=true'),
        'much drop-path': ('student.drop_path_rate=0.5', 'student.drop_path_uniform=true'),
        'no drop-path': ('student.drop_path_rate=0', 'student.layerscale=0'),
        'SwiGLU': ('student.ffn_layer=swiglufused',),
    },
    'dinov3': {
        'as the 7B': (),
        'RoPE augmentation': ('student.pos_embed_rope_shift_coords=0.2', 'student.pos_embed_rope_jitter_coords=2'),
        'untied norms': ('student.untie_cls_and_patch_norms=true', 'student.untie_global_and_local_cls_norm=true'),
        'untied norms of class and patches': (
            'student.untie_cls_and_patch_norms=true', 'student.untie_global_and_local_cls_norm=false',
        ),
        'much drop-path, no registers': ('student.drop_path_rate=0.5', 'student.n_storage_tokens=0'),
        'no drop-path, SwiGLU': ('student.drop_path_rate=0', 'student.ffn_layer=swiglu64'),
        'as ViT-L on ImageNet': ('student.norm_layer=layernorm', 'student.mask_k_bias=false'),
    },
}  # fmt: skip


def test_own_tokens_are_the_plain_models_to_the_bit(build, name):
    for variant, options in VARIANTS[name].items():
        expected, arch = own_tokens(build(*options)), build(*options, *MTE)
        assert_same(expected, own_tokens(arch), variant)
        with torch.no_grad():
            for network in (arch.student, arch.teacher):
                network['mte'].cls_tokens.normal_(std=9)
        assert_same(expected, own_tokens(arch), variant)


def test_auxiliary_tokens_are_another_with_other_tokens_and_see_global(build):
    x = steps.batch(0, 0, 1)['collated_global_crops']
    seen = []
    for options in ((), ('mte.see_global=true',)):
        arch = build(*MTE, *options, 'student.drop_path_rate=0')
        seen.append(arch.teacher['backbone'](x, is_training=True)['x_norm_mte'])
        with torch.no_grad():
            arch.teacher['mte'].cls_tokens.normal_()
        seen.append(arch.teacher['backbone'](x, is_training=True)['x_norm_mte'])
    for i, one in enumerate(seen):
        assert one.shape == (2 * steps.IMAGES, 3, 48)
        assert all((one - other).abs().max() > 1e-4 for other in seen[:i])


@pytest.mark.parametrize('full', [False, True])
def test_activation_checkpointing_changes_no_gradient(build_v3, full):
    from dinov3.fsdp.ac_compile_parallelize import activation_checkpoint_transformer

    plain, saved = build_v3(*MTE), build_v3(*MTE, f'train.checkpointing_full={str(full).lower()}')
    activation_checkpoint_transformer(saved.cfg, saved.student['backbone'])
    assert_same(own_tokens(plain), own_tokens(saved))
    assert_same(step(plain), step(saved))
    for one, other in zip(plain.student.parameters(), saved.student.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_blocks_with_observers_and_the_branch_compile_without_a_graph_break(build_v3):
    arch = build_v3(*MTE)
    backbone = arch.student['backbone']
    x, grid = backbone.prepare_tokens_with_masks(steps.batch(0, 0, 1)['collated_global_crops'])
    rope = backbone.rope_embed(H=grid[0], W=grid[1])
    block, small = backbone.blocks[1], (x[:4], x[:, :8].contiguous())
    block.sample_drop_ratio = 0.0  # whose randperm differs from run to run
    expected = block([x, small[0]], [rope, rope])
    found = torch.compile(block, fullgraph=True, backend='aot_eager')([x, small[0]], [rope, rope])
    for one, other in zip(expected, found):
        torch.testing.assert_close(one, other)
    runs = []
    compiled = torch.compile(arch.student['mte'], fullgraph=True, backend='aot_eager')
    arch.student['mte'].register_forward_hook(lambda branch, args, out: runs.append((*args, out)))
    step(arch)
    for x, out in runs[:3]:
        torch.testing.assert_close(compiled(x), out)


# --- losses, equations 4 to 6 by hand


def ensemble(network, out):
    """Fused logits, token by token."""
    mte, patches = network['mte'], out['x_norm_patchtokens']
    side = round(patches.shape[1] ** 0.5)
    aux_cls = slow_form.enhanced(mte.ten, out['x_norm_mte'], patches)
    tokens = torch.cat([aux_cls, slow_form.pooled(mte.pool, patches, (side, side))], dim=1)
    projected = [F.normalize(head.mlp(t), dim=-1) for head, t in zip(mte.heads, tokens.unbind(1))]
    return network['dino_head'].last_layer(sum(projected) / len(projected))


def sinkhorn(logits, temp):
    q = (logits / temp).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def mean_over_pairs(of_global, of_local, targets):
    """L: cross-entropy of each crop of the student with each other crop of the teacher."""
    targets, crops = targets.chunk(2), [*of_global.chunk(2), *of_local.chunk(steps.LOCAL)]
    pairs = [(s, t) for i, s in enumerate(crops) for j, t in enumerate(targets) if i != j]
    return sum(-(t * (s / 0.1).log_softmax(-1)).sum(-1).mean() for s, t in pairs) / len(pairs)


def by_hand(arch, w, temp=0.05):
    """The loss of a step, and what the teacher's ensemble says."""
    x, (student, teacher) = steps.batch(0, 0, 1), (arch.student, arch.teacher)
    crops, indices = [x['collated_global_crops'], x['collated_local_crops']], x['mask_indices_list']
    of_global, of_local = student['backbone'](crops, masks=[x['collated_masks'], None], is_training=True)
    with torch.no_grad():
        out = teacher['backbone'](crops[0], is_training=True)
        of_teacher = ensemble(teacher, out)
    patches = [o['x_norm_patchtokens'].flatten(0, 1)[indices] for o in (out, of_global)]
    separate = 'ibot_head' in student
    of_patches = [net['ibot_head' if separate else 'dino_head'](p) for net, p in zip((teacher, student), patches)]
    if arch.cfg.train.centering == 'centering':
        targets, center = ((of_teacher - arch.dino_loss.center) / temp).softmax(-1), arch.ibot_patch_loss.center[0]
        patch_targets = ((of_patches[0] - center) / temp).softmax(-1)
    else:
        targets, patch_targets = sinkhorn(of_teacher, temp), sinkhorn(of_patches[0], temp)
    each = -(patch_targets.detach() * (of_patches[1] / 0.1).log_softmax(-1)).sum(-1)
    ibot = (each * x['masks_weight']).sum() / len(crops[0])
    cls = [o['x_norm_clstoken'] for o in (of_global, of_local)]
    koleo = arch.cfg.dino.koleo_loss_weight * sum(arch.koleo_loss(c) for c in cls[0].chunk(2))
    dist = mean_over_pairs(*(student['dino_head'](c) for c in cls), targets)
    aux = mean_over_pairs(*(ensemble(student, o) for o in (of_global, of_local)), targets)
    total = arch.cfg.dino.loss_weight * (aux + w * dist) / (1 + w) + koleo + arch.cfg.ibot.loss_weight * ibot
    return total, of_teacher


SETTINGS = {
    'dinov2': [
        (f'train.centering={c}', f'ibot.separate_head={s}')
        for c in ('centering', 'sinkhorn_knopp')
        for s in ('false', 'true')
    ],
    'dinov3': [(), ('dino.loss_weight=0.7', 'ibot.loss_weight=2')],
}


@pytest.mark.parametrize('w', [0.0, 0.5, 1.0])
def test_loss_and_gradients_are_those_of_equations_4_to_6(build, name, w):
    for options in SETTINGS[name]:
        arch = build(*MTE, f'mte.weight={w}', 'student.drop_path_rate=0', *options)
        arch.dino_loss.center.normal_(std=0.1), arch.ibot_patch_loss.center.normal_(std=0.1)
        expected, of_teacher = by_hand(arch, w)
        parameters = dict(arch.student.named_parameters())
        grads = torch.autograd.grad(expected, parameters.values(), allow_unused=True)
        step(arch)
        torch.testing.assert_close(arch.optimized[0], expected.detach(), rtol=1e-5, atol=1e-5)
        for (key, p), grad in zip(parameters.items(), grads):
            if w == 0 and grad is None:  # the class token's own way to DINO's loss
                assert p.grad is None or not p.grad.any(), (options, key)
                continue
            assert grad is not None and p.grad is not None, (options, key)
            torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5 + 1e-4 * float(grad.abs().max()), msg=key)
        if arch.cfg.train.centering == 'centering':  # it moves once, with the ensemble
            torch.testing.assert_close(arch.dino_loss.async_batch_center, of_teacher.sum(0, keepdim=True))


def test_terms_without_the_class_token_are_the_plain_runs_to_the_bit_in_the_first_step(build, name):
    gram = ('use_loss=true', 'ema_teacher=true', 'rep_update=false', 'it_load_ema_teacher=0')
    options = [f'gram.{option}' for option in gram] if name == 'dinov3' else []
    expected, found = (step(build(*options, *more)) for more in ((), MTE))
    terms = ['koleo_loss', 'ibot_loss', *(['gram_loss'] if name == 'dinov3' else [])]
    assert [expected[t].item() for t in terms] == [found[t].item() for t in terms]
    assert expected['dino_global_crops_loss'] != found['dino_global_crops_loss']
    for key, value in expected.items():  # in the log, ours stand beside the host's
        assert key in found, (key, value)


def test_every_auxiliary_parameter_has_a_gradient(build):
    for options in ((), ('mte.n_cls=0',), ('mte.n_pool=0',)):
        arch = build(*MTE, *options)
        step(arch)
        for key, p in arch.student['mte'].named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, (options, key)
        assert all(p.grad is None and not p.requires_grad for p in arch.teacher.parameters())


# --- FSDP


def fsdp(name, patched, out, stop, *options, world=1):
    """Steps of the worker script until ``stop``; what it found."""
    script = [ROOT / 'tests' / 'steps_of_dinov.py']
    run(name, patched, out, stop, *MTE, 'student.drop_path_rate=0', *options, script=script, world=world)
    return torch.load(out / 'found.pt')


def test_two_processes_are_one(name, patched, tmp_path):
    """But for KoLeo, which the hosts compute in each process."""
    one, two = tmp_path / 'one', tmp_path / 'two'
    koleo = 'dino.koleo_loss_weight=0'
    if name == 'dinov3':  # its weights are drawn in each process: both begin with one checkpoint
        fsdp(name, patched, one, 1, koleo)
        subprocess.run(['cp', '-r', one, two], check=True)
    a, b = fsdp(name, patched, one, 3, koleo), fsdp(name, patched, two, 3, koleo, world=2)
    for x, y in zip(a['losses'], b['losses']):
        for key in x:
            if key != 'koleo_loss' and 'weight' not in key:
                torch.testing.assert_close(x[key], y[key] / 2, rtol=1e-5, atol=1e-6)
    for network in ('student', 'teacher'):
        for key, value in a[network].items():
            torch.testing.assert_close(b[network][key], value, rtol=1e-4, atol=1e-6, equal_nan=True, msg=key)
    assert all(not torch.equal(a['teacher'][k], a['before'][k]) for k in ('mte.cls_tokens', 'mte.heads.0.mlp.0.weight'))


def test_a_resumed_run_is_the_uninterrupted_one_and_the_average_covers_all(name, patched, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    centering = 'train.centering=sinkhorn_knopp'  # DINOv2 saves no center that is still to be updated
    a = fsdp(name, patched, whole, 2, centering)
    fsdp(name, patched, parts, 1, centering)
    b = fsdp(name, patched, parts, 2, centering)
    assert (a['start'], b['start']) == (0, 1)
    assert_same([a['student'], a['teacher']], [b['student'], b['teacher']])
    for key, teacher in a['teacher'].items():
        if key.startswith('mte.'):
            expected = 0.9 * a['before'][key] + 0.1 * a['student'][key]
            torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-7, msg=key)


# --- what is refused


@pytest.mark.parametrize(
    'option, said',
    [('mte.n_clss=3', 'mte.n_clss: unknown option; there are n_cls'), ('mte.n_pool=-1', 'n_pool=-1'),
     ('mte.weight=-1', 'weight=-1')],
)  # fmt: skip
def test_bad_options_are_named(build, option, said):
    with pytest.raises(ValueError, match=said):
        build(option)


def test_layers_between_are_refused_in_training(build):
    with pytest.raises(ValueError, match='stripped model'):
        build('mte=true').student['backbone'].get_intermediate_layers(torch.randn(1, 3, 32, 32))


def test_weights_of_a_plain_run_are_refused(build):
    plain, arch = build(), build(*MTE)
    with pytest.raises(ValueError, match=r'no student\.mte'):
        arch.load_state_dict(plain.state_dict(), strict=False)
    with pytest.raises(ValueError, match='no mte'):
        arch.student.load_state_dict(plain.student.state_dict())


def test_distillation_is_refused(build_v3, tmp_path):
    teacher = tmp_path / 'teacher.yaml'
    teacher.write_text(CONFIGS['dinov3'])
    for option in ('multidistillation.enabled=true', 'distillation.enabled=true'):
        with pytest.raises(ValueError, match='mte does not go with'):
            build_v3(*MTE, option, f'distillation.full_cfg_path={teacher}')


# --- what becomes of the backbone


STRIPPED = {
    'dinov2': ('vit_small_patch14_reg4_dinov2', dict(reg_tokens=2)),
    'dinov3': ('vit_small_patch16_dinov3_qkvb', dict(num_reg_tokens=2, global_pool='token')),
}


def test_stripped_model_has_the_features_of_the_repositorys_backbone(name, trained, build):
    """From all that train.py writes: the teacher for evaluation, and what it resumes from."""
    model, kwargs = STRIPPED[name]
    saved = trained / 'eval' / 'training_3' / 'teacher_checkpoint.pth'
    backbone = build().teacher['backbone']
    state = torch.load(saved, weights_only=True)['teacher']
    backbone.load_state_dict({k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')})
    resumed = trained / 'model_final.rank_0.pth', None
    if name == 'dinov3':  # its training rotates in bfloat16, whatever its config says, and its hub's models do not
        backbone.rope_embed.dtype = torch.float32
        backbone.rope_embed._init_weights()
        checkpoint(name, trained)
        resumed = trained / 'ckpt.pth', 'model.teacher'
    x = steps.batch(0, 0, 1)['collated_global_crops']
    with torch.no_grad():
        expected = backbone(x)
        for path, key in ((saved, None), resumed):
            report = mte.strip_checkpoint(
                path, model, key, embed_dim=48, depth=4, num_heads=3, patch_size=8, img_size=32, **kwargs
            )
            gap = (report.model(x) - expected).abs().max().item() / expected.abs().max().item()
            print(f'{name}: {report.key}, {report.loaded} tensors, features {gap:.1e} apart')
            assert gap < 1e-6 and any('mte' in k for k in report.dropped)


def test_gram_teachers_are_made_of_runs_with_auxiliary_tokens(name, patched, trained, data, tmp_path):
    """From a checkpoint, then from the moving average."""
    if name != 'dinov3':
        pytest.skip('of DINOv3')
    gram = ['gram.use_loss=true', f'gram.ckpt={trained}/eval/training_3/teacher_checkpoint.pth']
    gram += ['gram.update_frequency=1', 'gram.it_load_ema_teacher=1', 'crops.gram_teacher_crops_size=48']
    run(name, patched, tmp_path / 'out', data, *MTE, *gram, 'optim.epochs=1')
    values = [entry['gram_loss'] for entry in metrics(tmp_path / 'out')]
    assert len(values) == 2 and all(0 < value < 1 for value in values)
    state = checkpoint(name, tmp_path / 'out')['model']  # updated after the last step
    for key in (k for k in state if k.startswith('gram_teacher.') and state[k].is_floating_point()):
        assert torch.equal(state[key], state[key.replace('gram_', '')]), key
