"""A wrapped model is handled as the timm model in it: assigned to, frozen, differentiated, taught."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
import zoo
from timm.utils import freeze, unfreeze
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

import mte_timm as mte

VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def wrapped(name='vit_tiny_patch16_224', **kwargs):
    torch.manual_seed(0)
    return mte.wrap(name, **{**VIT, **kwargs})


def images(n=3, size=32):
    return torch.randn(n, 3, size, size)


# --- assignment


@pytest.mark.parametrize('register', [setattr, lambda m, n, v: m.register_parameter(n, v)])
def test_an_assigned_parameter_is_the_backbones(register):
    model = wrapped(num_classes=0)
    new = nn.Parameter(torch.zeros_like(model.pos_embed))
    register(model, 'pos_embed', new)
    assert model.backbone.pos_embed is new and mte.strip(model).pos_embed is new
    assert [n for n, p in model.named_parameters() if p is new] == ['backbone.pos_embed']


def test_an_assigned_part_takes_effect():
    model, x = wrapped(num_classes=0), images()
    before = model(x).output
    model.norm = nn.Identity()
    assert isinstance(model.backbone.norm, nn.Identity) and not torch.equal(model(x).output, before)
    model.blocks = nn.Sequential()
    assert len(model.backbone.blocks) == 0
    model.add_module('norm', nn.LayerNorm(48))
    assert model.backbone.norm is model.norm
    model.register_buffer('mean', torch.zeros(3))  # of nobody: the wrapped model's own
    assert 'mean' in dict(model.named_buffers()) and not hasattr(model.backbone, 'mean')
    del model.cls_token
    assert not hasattr(model.backbone, 'cls_token')


def test_a_number_is_assigned_through_and_a_new_name_is_not():
    model = wrapped(num_classes=0)
    model.grad_checkpointing = True
    assert model.backbone.grad_checkpointing
    model.note = 'mine'
    assert model.note == 'mine' and not hasattr(model.backbone, 'note')
    twin = copy.deepcopy(model)
    twin.grad_checkpointing = False
    assert model.backbone.grad_checkpointing and not twin.backbone.grad_checkpointing


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'test_resnet'])
def test_a_classifier_of_other_classes_is_refused_with_the_call_that_replaces_all(name, tmp_path):
    attending = name.startswith('vit')
    model = wrapped(num_classes=10) if attending else mte.wrap(name, n_cls=0, num_classes=10)
    part, width = ('head', 48) if attending else ('fc', model.num_features)
    with pytest.raises(ValueError, match=r'reset_classifier\(3\)'):
        setattr(model, part, nn.Linear(width, 3))
    with pytest.raises(ValueError, match=r'reset_classifier\(3\)'):
        model.add_module(part, nn.Linear(width, 3))
    with pytest.raises(ValueError, match=r'reset_classifier\(0\)'):
        setattr(model, part, nn.Identity())
    model.reset_classifier(3)
    setattr(model, part, nn.Linear(width, 3))
    out = model(images(size=32 if attending else 160))
    assert out.output.shape == out.aux.shape == (3, 3)
    (out.output.sum() + out.aux.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    zoo.needs_local_dir()
    folder = mte.save_pretrained(model, tmp_path / 'x', model_args=VIT if attending else None)
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).num_classes == 3


def test_a_classifier_that_was_replaced_behind_the_models_back_is_an_error():
    model = wrapped(num_classes=10)
    model.backbone.head = nn.Linear(48, 3)
    with pytest.raises(ValueError, match=r'reset_classifier\(3\)'):
        model(images())


def test_timm_freezes_and_unfreezes_parts():
    model = wrapped(num_classes=0)
    freeze(model, ['blocks.0', 'patch_embed'])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(n.startswith(('backbone.blocks.0.', 'backbone.patch_embed.')) for n in frozen)
    conv = mte.wrap('resnet18', n_cls=0, num_classes=0)
    freeze(conv, ['bn1', 'layer1'])
    assert type(conv.backbone.bn1).__name__ == type(conv.backbone.layer1[0].bn1).__name__ == 'FrozenBatchNorm2d'
    unfreeze(conv, ['bn1', 'layer1'])
    assert type(conv.backbone.bn1) is nn.BatchNorm2d and all(p.requires_grad for p in conv.parameters())


# --- torch.func


FUNC = {
    'vit': lambda: wrapped(num_classes=0),
    'own point-wise': lambda: wrapped(num_classes=0, shared_pointwise=False),
    'heads': lambda: wrapped(head=lambda dim: nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, 8))),
    'pooled only': lambda: wrapped(num_classes=0, n_cls=0),
    'rope': lambda: wrapped('eva02_tiny_patch14_224', num_classes=0),
    'convolutional': lambda: mte.wrap('test_convnext', n_cls=0, num_classes=0),
}


@pytest.mark.parametrize('name', FUNC)
def test_gradients_of_each_sample_are_those_of_a_loop(name):
    model = FUNC[name]().eval()
    x = images(size=160 if name == 'convolutional' else 32)
    weights = {k: v.detach() for k, v in model.named_parameters()}

    def loss(weights, image):
        out = functional_call(model, weights, (image[None],))
        return out.output.pow(2).mean() + out.aux.pow(2).mean()

    each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i, image in enumerate(x):
        model.zero_grad()
        out = model(image[None])
        (out.output.pow(2).mean() + out.aux.pow(2).mean()).backward()
        for k, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(each[k][i], p.grad, rtol=1e-4, atol=1e-6)


def test_forward_and_jacobian_under_transforms():
    model, x = wrapped(num_classes=0).eval(), images()
    many = vmap(lambda image: model(image[None]).aux[0])(x)
    torch.testing.assert_close(many, model(x).aux, rtol=1e-4, atol=1e-5)
    assert jacrev(lambda image: model(image).aux[0, :2])(x[:1]).shape == (2, 1, 3, 32, 32)


# --- torch.compile


@pytest.mark.skipif(torch.__version__ < '2.6', reason='older dynamo does not trace the making of tensor subclasses')
def test_the_second_step_compiles_nothing():
    script = """
import torch, mte_timm as mte
torch._dynamo.config.error_on_recompile = True
model = mte.wrap('vit_tiny_patch16_224', num_classes=3, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
compiled, criterion = torch.compile(model, backend='eager', fullgraph=True), mte.MTECrossEntropy()
for _ in range(3):
    criterion(compiled(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
"""
    subprocess.run([sys.executable, '-W', 'ignore', '-c', script], check=True)  # afresh, as a training script is


# --- batches


@pytest.mark.parametrize('name', ['vit', 'own point-wise', 'heads', 'pooled only', 'convolutional'])
def test_an_empty_batch_gives_empty_outputs(name):
    model = FUNC[name]()
    out = model(images(0, size=160 if name == 'convolutional' else 32))
    assert len(out.output) == len(out.aux) == 0 and out.aux.shape[1:] == out.output.shape[1:]
    out.aux.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ('model', 'advice'),
    [
        (lambda: wrapped(num_classes=0), 'dynamic_img_size=True'),
        (lambda: mte.wrap('cait_xxs24_224', num_classes=0, img_size=32, embed_dim=48, depth=2), 'img_size=16'),
    ],
)
def test_views_of_a_size_that_the_model_was_not_made_for_name_the_argument(model, advice):
    with pytest.raises(ValueError, match=f'images of 16x16.*made for 32x32.*{advice}'):
        model()([images(), images(size=16)])


# --- teachers


RANDOM = {
    'vit': (
        'vit_tiny_patch16_224',
        VIT | dict(drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.2, drop_rate=0.2),
    ),
    'rope': ('eva02_tiny_patch14_224', VIT | dict(drop_path_rate=0.3)),
    'swin': ('swin_tiny_patch4_window7_224', dict(drop_path_rate=0.3, attn_drop_rate=0.2, img_size=64, window_size=4)),
    'resnet': ('resnet18', dict(drop_path_rate=0.3, drop_rate=0.3)),
    'densenet': ('densenet121', dict(drop_rate=0.3, growth_rate=4, block_config=(1, 1, 1, 1))),
    'shuffled': (
        'sequencer2d_s',
        dict(layers=(1, 1), embed_dims=(8, 16), hidden_sizes=(4, 4), mlp_ratios=(1, 1), patch_sizes=(7, 2)),
    ),
}


@pytest.mark.parametrize('name', RANDOM)
def test_a_teacher_is_deterministic_in_train_mode(name):
    architecture, kwargs = RANDOM[name]

    def head(dim):
        return nn.Sequential(nn.Linear(dim, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    tokens = {} if name in ('vit', 'rope') else {'n_cls': 0}
    student = mte.wrap(architecture, head=head, **tokens, **kwargs).train()
    teacher = mte.make_teacher(student)
    x = images(2, size={'vit': 32, 'rope': 32, 'shuffled': 224}.get(name, 64))
    norms = [m for m in teacher.modules() if 'running_mean' in m._buffers]
    assert teacher.training and all(m.training for m in norms) and all(m.training for m in student.modules())
    with torch.no_grad():
        before = [m.running_mean.clone() for m in norms]
        first, second = teacher(x).aux, teacher(x).aux
        assert torch.equal(first, second)
        assert not any(torch.equal(m.running_mean, b) for m, b in zip(norms, before))
        teacher.backbone.train()  # of a part
        teacher.aux.heads.train()
        assert torch.equal(teacher(x).aux, first)
        evaluated = teacher.eval()(x).aux
        assert not any(m.training for m in norms)
        assert torch.equal(first, evaluated) == (not norms)
        assert not torch.equal(student(x).aux, student(x).aux)


def test_a_teacher_computes_with_its_present_weights():
    teacher = mte.make_teacher(mte.wrap('levit_128s', n_cls=0, num_classes=0)).eval()
    x = images(1, size=224)
    with torch.no_grad():
        teacher(x)  # timm keeps attention biases in eval mode
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
        fresh = copy.deepcopy(teacher)
        fresh.train().eval()
        assert torch.equal(teacher(x).aux, fresh(x).aux)


# --- extras


@pytest.mark.parametrize('package', ['matplotlib', 'sklearn'])
def test_a_missing_package_names_the_extra(package, monkeypatch):
    from mte_timm import analysis

    tokens = analysis.collect(wrapped(num_classes=0), [(images(4), torch.tensor([0, 1, 0, 1]))])
    monkeypatch.setitem(sys.modules, package, None)
    for name in [n for n in sys.modules if n.startswith(f'{package}.')]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install .*\[analysis\]'):
        if package == 'matplotlib':
            analysis.plot_cka(tokens)
        else:
            analysis.accuracy_by_class(tokens, tokens, analysis.linear_predict)
