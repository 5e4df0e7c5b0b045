"""A wrapped model is handled as the timm model in it: assigned to, frozen, differentiated, taught."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
import zoo
from timm.utils import freeze, reparameterize_model, unfreeze
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.testing import assert_close

import mte_timm as mte
from mte_timm import analysis


def wrapped(name=zoo.NAME, num_classes=0, head=None, **kwargs):
    return mte.wrap(name, num_classes=num_classes, head=head, **{**zoo.VIT, **kwargs})


def images(n=3, size=32):
    return torch.randn(n, 3, size, size)


# --- assignment


@pytest.mark.parametrize('register', [setattr, lambda m, n, v: m.register_parameter(n, v)])
def test_an_assigned_parameter_is_the_backbones(register):
    model = wrapped()
    new = nn.Parameter(torch.zeros_like(model.pos_embed))
    register(model, 'pos_embed', new)
    assert model.backbone.pos_embed is new and mte.strip(model).pos_embed is new
    assert [n for n, p in model.named_parameters() if p is new] == ['backbone.pos_embed']


def test_an_assigned_part_takes_effect():
    model, x = wrapped(), images()
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
    model = wrapped()
    model.grad_checkpointing = True
    assert model.backbone.grad_checkpointing
    model.note = 'mine'
    assert model.note == 'mine' and not hasattr(model.backbone, 'note')
    twin = copy.deepcopy(model)
    twin.grad_checkpointing = False
    assert model.backbone.grad_checkpointing and not twin.backbone.grad_checkpointing


@pytest.mark.parametrize('attends', [True, False])
def test_a_classifier_of_other_classes_is_refused_with_the_call_that_replaces_all(attends, tmp_path):
    model = wrapped(num_classes=10) if attends else mte.wrap('test_resnet', n_cls=0, num_classes=10)
    part, width = ('head', 48) if attends else ('fc', model.num_features)
    for assign, new in ((setattr, nn.Linear(width, 3)), (type(model).add_module, nn.Linear(width, 3))):
        with pytest.raises(ValueError, match=r'reset_classifier\(3\)'):
            assign(model, part, new)
    with pytest.raises(ValueError, match=r'reset_classifier\(0\)'):
        setattr(model, part, nn.Identity())
    model.reset_classifier(3)
    setattr(model, part, nn.Linear(width, 3))
    out = model(images(size=32 if attends else 160))
    assert out.output.shape == out.aux.shape == (3, 3)
    (out.output.sum() + out.aux.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    zoo.needs_local_dir()
    folder = mte.save_pretrained(model, tmp_path / 'x', model_args=zoo.VIT if attends else None)
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).num_classes == 3


def test_a_classifier_that_was_replaced_behind_the_models_back_is_an_error():
    model = wrapped(num_classes=10)
    model.backbone.head = nn.Linear(48, 3)
    with pytest.raises(ValueError, match=r'reset_classifier\(3\)'):
        model(images())


def test_timm_freezes_and_unfreezes_parts():
    model = wrapped()
    freeze(model, ['blocks.0', 'patch_embed'])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(n.startswith(('backbone.blocks.0.', 'backbone.patch_embed.')) for n in frozen)
    conv = mte.wrap('resnet18', n_cls=0, num_classes=0)
    freeze(conv, ['bn1', 'layer1'])
    assert type(conv.backbone.bn1).__name__ == type(conv.backbone.layer1[0].bn1).__name__ == 'FrozenBatchNorm2d'
    unfreeze(conv, ['bn1', 'layer1'])
    assert type(conv.backbone.bn1) is nn.BatchNorm2d and all(p.requires_grad for p in conv.parameters())


# --- torch.func and torch.compile


MODELS = {
    'vit': wrapped,
    'own point-wise': lambda: wrapped(shared_pointwise=False),
    'heads': lambda: wrapped(head=lambda dim: nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, 8))),
    'pooled only': lambda: wrapped(n_cls=0),
    'rope': lambda: wrapped('eva02_tiny_patch14_224'),
    'convolutional': lambda: mte.wrap('test_convnext', n_cls=0, num_classes=0),
}


def side(name):
    return 160 if name == 'convolutional' else 32


@pytest.mark.parametrize('name', MODELS)
def test_gradients_of_each_sample_are_those_of_a_loop(name):
    model, x = MODELS[name]().eval(), images(size=side(name))
    weights = {k: v.detach() for k, v in model.named_parameters()}

    def loss(weights, image):
        out = functional_call(model, weights, (image[None],))
        return out.output.pow(2).mean() + out.aux.pow(2).mean()

    each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i, image in enumerate(x):
        model.zero_grad()
        loss(dict(model.named_parameters()), image).backward()
        for k, p in model.named_parameters():
            if p.grad is not None:
                assert_close(each[k][i], p.grad, rtol=1e-4, atol=1e-6)


def test_forward_and_jacobian_under_transforms():
    model, x = wrapped().eval(), images()
    assert_close(vmap(lambda image: model(image[None]).aux[0])(x), model(x).aux, rtol=1e-4, atol=1e-5)
    assert jacrev(lambda image: model(image).aux[0, :2])(x[:1]).shape == (2, 1, 3, 32, 32)


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
    model = MODELS[name]()
    out = model(images(0, size=side(name)))
    assert len(out.output) == len(out.aux) == 0 and out.aux.shape[1:] == out.output.shape[1:]
    out.aux.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ('model', 'advice'),
    [
        (wrapped, 'dynamic_img_size=True'),
        (lambda: mte.wrap('cait_xxs24_224', num_classes=0, img_size=32, embed_dim=48, depth=2), 'img_size=16'),
    ],
)
def test_views_of_a_size_that_the_model_was_not_made_for_name_the_argument(model, advice):
    with pytest.raises(ValueError, match=f'images of 16x16.*made for 32x32.*{advice}'):
        model()([images(), images(size=16)])


# --- teachers


VIT_DROPS = dict(drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.2, drop_rate=0.2)
LSTM = dict(layers=(1, 1), embed_dims=(8, 16), hidden_sizes=(4, 4), mlp_ratios=(1, 1), patch_sizes=(7, 2))
RANDOM = {  # architecture, size of the images, what draws
    'vit': (zoo.NAME, 32, zoo.VIT | VIT_DROPS),
    'rope': ('eva02_tiny_patch14_224', 32, zoo.VIT | dict(drop_path_rate=0.3)),
    'swin': (
        'swin_tiny_patch4_window7_224',
        64,
        dict(drop_path_rate=0.3, attn_drop_rate=0.2, img_size=64, window_size=4),
    ),
    'resnet': ('resnet18', 64, dict(drop_path_rate=0.3, drop_rate=0.3)),
    'densenet': ('densenet121', 64, dict(drop_rate=0.3, growth_rate=4, block_config=(1, 1, 1, 1))),
    'shuffled': ('sequencer2d_s', 224, LSTM),
}


@pytest.mark.parametrize('name', RANDOM)
def test_a_teacher_is_deterministic_in_train_mode(name):
    architecture, size, kwargs = RANDOM[name]

    def head(dim):
        return nn.Sequential(nn.Linear(dim, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    tokens = {} if name in ('vit', 'rope') else {'n_cls': 0}
    student, x = mte.wrap(architecture, head=head, **tokens, **kwargs).train(), images(2, size)
    teacher = mte.make_teacher(student)
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


def test_what_runs_in_eval_mode_between_computes_with_present_weights():
    model = mte.wrap('levit_128s', n_cls=0, num_classes=0).eval()
    batches = [images(2, size=224)]
    with torch.no_grad():
        analysis.collect(model, batches)
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        found, fresh = analysis.collect(model, batches), copy.deepcopy(model).train().eval()
        assert torch.equal(found.features[0], analysis.collect(fresh, batches).features[0])


def test_a_hook_that_keeps_the_final_norm_has_the_models_own_tokens():
    model, kept = wrapped(), {}
    model.norm.register_forward_hook(lambda module, inputs, out: kept.update(out=out))
    out = model(images(2))
    assert torch.equal(kept['out'][:, 0], out.tokens.global_token)


def test_data_parallel_is_refused():
    with pytest.raises(TypeError, match='use DistributedDataParallel'):
        wrapped()._replicate_for_data_parallel()  # as replicate() does on two devices


def test_a_new_classifier_leaves_the_mode_of_other_parts():
    model = wrapped(num_classes=4)
    model.backbone.blocks[0].eval()
    model.reset_classifier(3)
    assert not model.backbone.blocks[0].mlp.training and model.aux.heads.training


def test_timm_reparameterizes_a_wrapped_model():
    model, x = mte.wrap('repvit_m0_9', n_cls=0, num_classes=0).eval(), images(2, size=64)
    with torch.no_grad():
        assert_close(reparameterize_model(model)(x).output, model(x).output, rtol=1e-3, atol=1e-4)


def test_a_teacher_that_is_trained_again_says_so():
    teacher = mte.make_teacher(wrapped(num_classes=4))
    teacher.reset_classifier(3)
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.warns(UserWarning, match='frozen'):
        mte.wrap(mte.strip(teacher))


# --- what runs when the model is called


@pytest.mark.parametrize('how', ['hook', 'forward_features', 'forward'])
@pytest.mark.parametrize('n_cls', [0, 4])
def test_what_changes_a_model_when_it_is_called_is_refused(how, n_cls):
    model, seen, x = timm.create_model(zoo.NAME, num_classes=0, **zoo.VIT), [], images()
    if how == 'hook':
        model.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(mte.wrap(model, n_cls=n_cls)(x).output, model(x))  # it only looks
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
    else:
        inner = getattr(model, how)
        setattr(model, how, lambda x, **kwargs: inner(x / 2, **kwargs))
    if how == 'forward_features' and not n_cls:  # which calls it
        assert torch.equal(mte.wrap(model, n_cls=0)(x).output, model(x))
        return
    with pytest.raises(ValueError, match='hooks'):
        mte.wrap(model, n_cls=n_cls)


# --- extras


@pytest.mark.parametrize('package', ['matplotlib', 'sklearn'])
def test_a_missing_package_names_the_extra(package, monkeypatch):
    from mte_timm import analysis

    tokens = analysis.collect(wrapped(), [(images(4), torch.tensor([0, 1, 0, 1]))])
    for name in (package, *(n for n in sys.modules if n.startswith(f'{package}.'))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install .*\[analysis\]'):
        if package == 'matplotlib':
            analysis.plot_cka(tokens)
        else:
            analysis.accuracy_by_class(tokens, tokens, analysis.linear_predict)
