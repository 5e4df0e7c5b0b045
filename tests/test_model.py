"""What wrap() promises a training script."""

import copy
import io
import pickle
import subprocess
import sys

import lookalikes as like
import pytest
import timm.optim
import torch
import zoo
from torch import nn
from torch.testing import assert_close

import mte_timm as mte

HALVES = (torch.bfloat16, torch.float16)


def head(dim):
    return nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, 7))


def prototype_head(dim):
    return like.PatchHead(dim, 13, 99)


def wrap(name='plain', head=None, num_classes=0, build=None, **options):
    """A wrapped model of the zoo."""
    return mte.wrap(zoo.build(name, num_classes, **build or {}), head=head, **{**zoo.counts(name), **options})


def wrapped_and_images(*args, **kwargs):
    wrapped = wrap(*args, **kwargs).eval()
    return wrapped, zoo.images(wrapped.backbone)


def auxiliary(out):
    return torch.cat([out.tokens.aux_cls, out.tokens.pooled], dim=1)


# --- outputs


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', zoo.ALL)
def test_output_is_the_plain_models_and_so_are_batch_statistics(name, training):
    model = zoo.build(name, num_classes=5)
    wrapped, x = mte.wrap(model, **zoo.counts(name)).train(training), zoo.images(model)
    assert model.training == training
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    expected, statistics = model(x), {k: b.clone() for k, b in model.named_buffers()}
    model.load_state_dict(before)
    torch.manual_seed(1)
    out = wrapped(x)
    assert torch.equal(out.output, expected) and out.output is out[0]
    assert out.aux.shape == out.output.shape
    if not training:
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.equal(out.tokens.global_token, features)
    n_cls, dim = zoo.counts(name).get('n_cls', 4), wrapped.adapter.dim
    assert out.tokens.aux_cls.shape == (2, n_cls, dim) and out.tokens.pooled.shape == (2, 6, dim)
    assert out.tokens.patches.shape[1] == out.tokens.grid[0] * out.tokens.grid[1]
    (out.output.sum() + out.aux.sum() + out.tokens.global_token.sum()).backward()
    for key, b in model.named_buffers():
        assert torch.equal(b, statistics[key]), key


@pytest.mark.parametrize('name', zoo.ALL)
def test_wrapping_changes_nothing_of_a_model_and_gives_its_features(name):
    model = zoo.build(name).eval()
    names, kinds, state = set(vars(model)), [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    wrapped = mte.wrap(model, **zoo.counts(name))
    out = wrapped(zoo.images(model))
    assert out.aux.shape == out.output.shape and torch.equal(out.output, out.tokens.global_token)
    assert set(vars(model)) == names and [type(m) for m in model.modules()] == kinds
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))
    assert all('forward' not in vars(m) for m in model.modules())
    assert mte.strip(wrapped) is model


@pytest.mark.parametrize('name', ['plain', 'rope_mixed', 'dinov3', 'convnext'])
def test_views_are_grouped_by_size_and_keep_their_order(name):
    attends = name in zoo.ATTENDING
    wrapped = wrap(name, head, build={'dynamic_img_size': True} if attends else {}).eval()
    side = 32 if attends else 64
    sizes = [(side, side), (side // 2, side), (side, side), (side // 2, side // 2), (side // 2, side)]
    views = [torch.randn(n, 3, *size) for n, size in zip((2, 2, 3, 1, 2), sizes)]
    runs, run = [], wrapped.adapter
    wrapped.adapter = lambda model, x, *a: runs.append(tuple(x.shape)) or run(model, x, *a)
    wrapped.adapter.num_classes = run.num_classes
    out = wrapped(views)
    assert sorted(runs) == sorted([(5, 3, *sizes[0]), (4, 3, *sizes[1]), (1, 3, *sizes[3])])
    singles = [wrapped(view) for view in views]
    for field in ('output', 'aux'):
        together = torch.cat([getattr(s, field) for s in singles])
        assert_close(getattr(out, field), together, rtol=1e-4, atol=1e-5)
    assert out.tokens.grid == tuple(s.tokens.grid for s in singles)
    assert [p.shape for p in out.tokens.patches] == [s.tokens.patches.shape for s in singles]


def test_input_size_can_be_changed():
    wrapped, x = wrap().eval(), torch.randn(2, 3, 48, 24)
    wrapped.set_input_size((48, 24))
    out = wrapped(x)
    assert out.tokens.grid == (6, 3) and torch.equal(out.output, wrapped.backbone(x))


# --- heads


def test_heads_are_independent_copies_of_the_hosts():
    wrapped, x = wrapped_and_images(head=head)
    out = wrapped(x)
    assert out.output.shape == out.aux.shape == (2, 7)
    weights = [h[0].weight for h in (wrapped.aux.global_head, *wrapped.aux.heads)]
    assert len(weights) == 11 and len({w.data_ptr() for w in weights}) == 11
    assert not torch.equal(weights[1], weights[2])
    assert_close(out.aux, sum(h(t) for h, t in zip(wrapped.aux.heads, auxiliary(out).unbind(1))) / 10)


def test_prototypes_are_shared():
    wrapped, x = wrapped_and_images(head=prototype_head)
    names = [n for n, _ in wrapped.named_parameters() if 'last_layer' in n and 'last_layer2' not in n]
    assert names and all(n.startswith('aux.global_head.last_layer.') for n in names)
    assert not any('last_layer2' in n for n, _ in wrapped.aux.heads.named_parameters())
    out = wrapped(x)
    bottlenecks = (h.mlp(t) for h, t in zip(wrapped.aux.heads, auxiliary(out).unbind(1)))
    mean = sum(nn.functional.normalize(b, dim=-1) for b in bottlenecks) / 10
    assert_close(out.aux, wrapped.aux.global_head.last_layer(mean))


class SoftmaxHead(like.Head):
    def forward(self, x):
        return super().forward(x).log_softmax(dim=-1)


class ReadsWeight(like.Head):
    def forward(self, x):
        return self.mlp(x) @ self.last_layer.weight.T


@pytest.mark.parametrize('kind', [SoftmaxHead, ReadsWeight])
def test_a_last_layer_that_is_not_last_is_refused(kind):
    with pytest.raises(ValueError, match='last thing'):
        wrap(head=lambda dim: kind(dim, 13))


def test_a_norm_before_the_prototypes_stays():
    class Head(like.Head):
        def __init__(self, dim):
            super().__init__(dim, 13)
            self.last_layer_norm = nn.LayerNorm(16)

        def forward(self, x):
            return self.last_layer(self.last_layer_norm(self.mlp(x)))

    assert all(isinstance(h.last_layer_norm, nn.LayerNorm) for h in wrap(head=Head).aux.heads)


def test_heads_run_once_over_all_views():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    wrapped = wrap(head=lambda d: Counting(d, 3), build={'dynamic_img_size': True}, n_cls=1, n_pool=1)
    calls.clear()
    wrapped(torch.randn(n, 3, side, side) for n, side in ((2, 32), (3, 16)))
    assert calls == [5, 5, 5]


def test_shared_head_serves_all_tokens():
    wrapped, x = wrapped_and_images(head=head, independent_heads=False)
    out = wrapped(x)
    assert len(wrapped.aux.heads) == 1
    assert_close(out.aux, wrapped.aux.heads[0](auxiliary(out)).mean(dim=1))


@pytest.mark.parametrize('independent', [True, False])
def test_one_head_for_all_is_refused(independent):
    one = nn.Linear(48, 8)
    with pytest.raises(TypeError, match=r'same Linear twice.*lambda dim: MyHead'):
        wrap(head=lambda dim: one, independent_heads=independent)


def test_lazy_heads_are_refused():
    with pytest.raises(ValueError, match=r'lazy.*input widths'):
        wrap(head=lambda dim: nn.Sequential(nn.Linear(dim, 8), nn.LazyLinear(4)))


@pytest.mark.parametrize('independent', [True, False])
def test_heads_that_return_several_things_are_refused(independent):
    class TwoOutputs(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    wrapped, x = wrapped_and_images(head=lambda dim: TwoOutputs(dim, 8), independent_heads=independent)
    with pytest.raises(TypeError, match='TwoOutputs returns a tuple; return the one tensor'):
        wrapped(x)


def test_classifiers_can_be_reset():
    wrapped, x = wrapped_and_images(num_classes=3)
    wrapped.reset_classifier(9)
    out = wrapped(x)
    assert out.output.shape == out.aux.shape == (2, 9)
    with pytest.raises(ValueError, match='head='):
        wrap(head=head).reset_classifier(3)
    with pytest.raises(ValueError, match='global_pool'):
        wrapped.reset_classifier(3, '')
    resnet, x = wrapped_and_images('resnet', num_classes=3)
    resnet.reset_classifier(0, 'catavgmax')
    out = resnet(x)
    assert out.output.shape == out.aux.shape == (2, 2 * resnet.adapter.dim)
    assert not any(m.training for m in resnet.aux.heads.modules())


# --- how a training runs it


@pytest.mark.parametrize('name', ['plain', 'rope_mixed'])
def test_gradient_checkpointing_changes_nothing_but_memory(name):
    grads, runs = [], [[], []]
    for enable, blocks_run in zip((False, True), runs):
        torch.manual_seed(0)
        wrapped = mte.wrap(zoo.build(name).double(), head=head)
        wrapped.set_grad_checkpointing(enable)
        wrapped.backbone.blocks[0].register_forward_pre_hook(lambda *_, seen=blocks_run: seen.append(1))
        torch.manual_seed(1)
        out = wrapped(zoo.images(wrapped.backbone, dtype=torch.float64))
        (out.output.sum() + out.aux.square().sum()).backward()
        grads.append({n: p.grad for n, p in wrapped.named_parameters()})
    assert [len(blocks_run) for blocks_run in runs] == [1, 2]
    for key, grad in grads[0].items():
        assert_close(grad, grads[1][key], rtol=0, atol=1e-12, msg=key)


@pytest.mark.skipif(torch.__version__ < '2.6', reason='older dynamo does not trace the making of tensor subclasses')
@pytest.mark.parametrize('name', ['plain', 'rope_mixed', 'convnext'])
def test_compiles_as_one_graph(name):
    wrapped, x = wrapped_and_images(name, head)
    out, eager = torch.compile(wrapped, fullgraph=True, backend='aot_eager')(x), wrapped(x)
    grads = []
    for run in (out, eager):
        wrapped.zero_grad()
        (run.output.sum() + run.aux.square().sum()).backward()
        grads.append([p.grad.clone() for p in wrapped.parameters()])
    for a, b in ((out.output, eager.output), (out.aux, eager.aux)):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(*grads):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiles_with_inductor_and_several_sizes():
    wrapped = wrap(head=head, build={'dynamic_img_size': True}).eval()
    compiled = torch.compile(wrapped, fullgraph=True, dynamic=False)
    for side in (32, 16):
        x = torch.randn(2, 3, side, side)
        assert_close(compiled(x).aux, wrapped(x).aux, rtol=1e-3, atol=1e-4)
    wrapped.set_grad_checkpointing()
    compiled(x).aux.sum().backward()


@pytest.mark.parametrize('name', ['plain', 'eva02', 'convnext', 'swin'])
@pytest.mark.parametrize('dtype', HALVES)
def test_autocast(name, dtype):
    wrapped, x = wrapped_and_images(name, head)  # in eval mode: no stochastic depth, which Swin draws
    full = wrapped(x)
    with torch.autocast('cpu', dtype):
        out, plain = wrapped(x), wrapped.aux.global_head(wrapped.backbone(x))
    assert out.aux.dtype == out.output.dtype == plain.dtype
    assert_close(out.output, plain, rtol=0.05, atol=0.05)
    assert_close(out.aux.float(), full.aux, rtol=0.1, atol=0.05)
    out.aux.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in wrapped.parameters() if p.grad is not None)


@pytest.mark.parametrize('name', ['plain', 'dinov3', 'convnext'])
@pytest.mark.parametrize('dtype', HALVES)
def test_half_precision_weights(name, dtype):
    wrapped, x = wrapped_and_images(name)
    out, x = wrapped.to(dtype)(x.to(dtype)), x.to(dtype)
    assert out.aux.dtype == dtype and out.aux.isfinite().all()
    assert torch.equal(out.output, wrapped.backbone(x))
    fresh = mte.wrap(zoo.build(name).to(dtype), **zoo.counts(name))
    assert {p.dtype for p in fresh.parameters()} == {dtype}


def test_channels_last():
    wrapped, x = wrapped_and_images('convnext')
    expected = wrapped(x)
    out = wrapped.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert_close(out.aux, expected.aux, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['plain', 'dinov3', 'swin', 'convnext', 'poolformer'])
def test_timms_optimizer_factory(name):
    wrapped = wrap(name, num_classes=3)
    options = dict(opt='adamw', lr=1.0, weight_decay=0.1, layer_decay=0.5)
    groups, plain = (timm.optim.create_optimizer_v2(m, **options).param_groups for m in (wrapped, wrapped.backbone))
    of, plain_of = ({id(p): g for g in each for p in g['params']} for each in (groups, plain))
    assert len(of) == sum(1 for _ in wrapped.parameters())
    for key, p in wrapped.backbone.named_parameters():
        ours, theirs = of[id(p)], plain_of[id(p)]
        assert ours['lr_scale'] == theirs['lr_scale'] and ours['weight_decay'] == theirs['weight_decay'], key
    top = max(g['lr_scale'] for g in groups)
    assert all(
        of[id(p)]['lr_scale'] == top for part in (wrapped.aux.pool, wrapped.aux.heads) for p in part.parameters()
    )
    for token in (wrapped.aux.cls_tokens, getattr(wrapped.backbone, 'cls_token', None)):
        assert token is None or of[id(token)]['weight_decay'] == 0


# --- copies and state dicts


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['copy', 'pickle'])
@pytest.mark.parametrize('name', ['plain', 'eva02', 'swin'])
def test_copies_are_whole_and_separate(name, copied):
    wrapped, x = wrapped_and_images(name, head if copied is copy.deepcopy else None)
    expected, twin = wrapped(x), copied(wrapped)
    assert torch.equal(twin(x).aux, expected.aux)
    zoo.perturb_auxiliaries(twin)
    assert torch.equal(wrapped(x).aux, expected.aux)


def test_a_head_with_weight_norm_can_be_copied_at_any_time():
    def weight_normed(dim):
        made = like.Head(dim, 13)
        made.last_layer = nn.utils.weight_norm(
            nn.Linear(16, 13, bias=False)
        )  # as DINO's own, whose copies torch refuses
        return made

    student, x = wrapped_and_images(head=weight_normed)
    for _ in range(2):
        teacher = copy.deepcopy(student).requires_grad_(False)
        assert torch.equal(teacher(x).aux, student(x).aux)
        with torch.no_grad():
            student.aux.global_head.last_layer.weight_v.normal_()
        assert not torch.equal(teacher(x).aux, student(x).aux)


@pytest.mark.parametrize('name', ['plain', 'dinov3', 'swin'])
def test_state_dict_round_trip(name):
    (first, x), second, file = wrapped_and_images(name, prototype_head), wrap(name, prototype_head).eval(), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(first(x).aux, second(x).aux)
    own = {k.removeprefix('backbone.') for k in first.state_dict() if k.startswith('backbone.')}
    assert own == set(first.backbone.state_dict())


def test_state_dicts_of_former_versions_load():
    """Before 0.1.0 the branch's parts stood beside the backbone."""
    wrapped = wrap(head=prototype_head)
    state = wrapped.state_dict()

    def former(name):
        name = name.removeprefix('aux.')
        return name.replace('cls_tokens', 'aux_cls').replace('heads.', 'aux_heads.') if name[:6] != 'global' else name

    old = {former(name): value + 1 for name, value in state.items()}
    assert {'aux_cls', 'ten.q.weight', 'pool.pw.0.weight', 'aux_heads.9.mlp.0.weight'} <= old.keys()
    for outer, prefix in ((wrapped, ''), (nn.DataParallel(wrapped), 'module.')):
        outer.load_state_dict(zoo.prefixed(old, prefix))
        for name, value in wrapped.state_dict().items():
            assert torch.equal(value, old[former(name)]), name
        wrapped.load_state_dict(state)


def test_weights_that_do_not_fit_say_why():
    model, other = wrap(n_cls=2, n_pool=3), wrap(n_cls=2, n_pool=2)
    plain = mte.strip(other).state_dict()
    for wrapped, prefix in ((model, ''), (nn.DataParallel(model), 'module.')):
        for strict in (True, False):  # with strict=False torch would load nothing and say nothing
            with pytest.raises(RuntimeError, match=r'weights of a plain model.*mte\.strip\(model\)\.load_state_dict'):
                wrapped.load_state_dict(zoo.prefixed(plain, prefix), strict)
        wrapped.load_state_dict(zoo.prefixed(model.state_dict(), prefix))
    with pytest.raises(RuntimeError, match=r'other auxiliary tokens.*n_pool=2 instead of 3'):
        model.load_state_dict(other.state_dict())
    own = {k: v for k, v in other.state_dict().items() if k.startswith('backbone.')}
    found = model.load_state_dict(own, strict=False)
    assert 'aux.cls_tokens' in found.missing_keys and torch.equal(model.cls_token, other.cls_token)


def test_weights_remember_their_options(tmp_path):
    """Also where every name and shape is the same, and where the wrapped model is a part of another module."""
    options = {'head': lambda dim: nn.Linear(dim, 8), 'independent_heads': False, 'n_cls': 2}
    average, none, seeing = (
        wrap(**options, **more)
        for more in ({'n_pool': 1, 'pooling': 'avg'}, {'n_pool': 0}, {'n_pool': 0, 'see_global': True})
    )
    torch.save({'student': average.state_dict()}, tmp_path / 'checkpoint.pth')
    saved = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['student']
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"n_pool=1 instead of 0, pooling='avg' instead of 'adaptive'"):
            none.load_state_dict(saved, strict)
        with pytest.raises(RuntimeError, match='n_pool=1 instead of 0'):
            nn.ModuleDict({'student': none}).load_state_dict(nn.ModuleDict({'student': average}).state_dict(), strict)
    with pytest.raises(RuntimeError, match='see_global=True instead of False'):
        none.load_state_dict(seeing.state_dict())
    none.load_state_dict({k: v for k, v in seeing.state_dict().items() if k.startswith('backbone.')}, strict=False)
    none.load_state_dict(dict(seeing.state_dict()))  # a plain dict of tensors says nothing of options
    copy.deepcopy(none).load_state_dict(none.state_dict())
    assert not any('mte' in k for k in none.state_dict())  # averages and optimizers see tensors alone


# --- what is made


def test_repr_says_what_was_added():
    text = repr(wrap())
    assert '4 auxiliary CLS tokens, 6 pooled tokens' in text and 'for training only' in text


def test_attributes_are_the_backbones():
    wrapped = wrap(num_classes=5)
    assert wrapped.embed_dim == 48 and wrapped.pretrained_cfg is wrapped.backbone.pretrained_cfg
    assert timm.data.resolve_data_config({}, model=wrapped)['input_size']
    with pytest.raises(AttributeError, match='VisionTransformer'):
        _ = wrapped.no_such_attribute


def test_auxiliary_tokens_start_different():
    aux = wrap().aux.cls_tokens[0]
    assert torch.pdist(aux.detach()).min() > 0.01 and 0.015 < aux.std() < 0.025


def test_a_name_is_created_with_its_arguments():
    wrapped = mte.wrap('vit_tiny_patch16_224', head=head, **zoo.VIT)
    assert wrapped.num_classes == 0 and wrapped.embed_dim == 48
    assert mte.wrap('test_vit', num_classes=3).num_classes == 3


def test_follows_device_of_the_model():
    wrapped = mte.wrap(timm.create_model('vit_tiny_patch16_224', num_classes=0).to('meta'), head=head)
    assert {p.device.type for p in wrapped.parameters()} == {'meta'}
    assert wrapped(torch.empty(2, 3, 224, 224, device='meta')).aux.shape == (2, 7)


def test_the_branch_can_be_initialized_after_the_meta_device():
    """As hosts build their models that shard them."""
    made = [wrap(num_classes=3).aux for _ in range(2)]
    branch, twin = made[0], copy.deepcopy(made[1]).to('meta').to_empty(device='cpu')
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(float('nan'))
    twin.init_weights()
    for (name, a), b in zip(branch.named_parameters(), twin.parameters()):
        assert b.isfinite().all() and (a == b).all() == (a.std() == 0), name  # constants are, draws differ
        assert_close(a.std(), b.std(), rtol=0.3, atol=0.02, msg=name)


def test_a_model_of_the_meta_device_is_initialized_as_a_whole():
    model = wrap().to('meta').to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    model.init_weights()
    assert not any((p == 7).all() for name, p in model.named_parameters() if name.startswith('aux.'))
    assert not (model.blocks[0].attn.qkv.weight == 7).all()


def test_what_nothing_initializes_is_named():
    with pytest.raises(ValueError, match='last_layer'):
        wrap(head=prototype_head).aux.init_weights()
    with pytest.raises(TypeError, match='ConvNeXt has none'):
        mte.wrap('test_convnext', n_cls=0, num_classes=0).init_weights()


def test_the_branch_serves_hosts_that_keep_their_backbone():
    wrapped, x = wrapped_and_images()
    branch = wrapped.aux
    assert torch.equal(branch(len(x)), branch.tokens(len(x)))  # also by forward, where sharding wrappers hook
    out, whole = branch(wrapped.adapter(wrapped.backbone, x, branch.tokens(len(x)))), wrapped(x)
    for ours, theirs in zip((out.output, out.aux, *out.tokens[:4]), (*whole[:2], *whole.tokens[:4])):
        assert torch.equal(ours, theirs)
    assert wrap(n_cls=0).aux.tokens(2) is None
    assert not any('backbone' in name for name in branch.state_dict())


def test_import_is_light():
    code = (
        'import sys, mte_timm; '
        "heavy = {'matplotlib', 'sklearn', 'scipy', 'lightly', 'pandas', 'yacs'} & set(sys.modules); "
        'assert not heavy, heavy'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


# --- what is refused


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(n_cls=-1), ValueError, 'n_cls=-1'),
        (dict(n_cls=2.0), ValueError, 'n_cls=2.0'),
        (dict(n_pool=True), ValueError, 'n_pool=True'),
        (dict(n_cls=0, n_pool=0), ValueError, 'no token'),
        (dict(kernel_size=4), ValueError, 'odd'),
        (dict(kernel_size='11'), ValueError, 'odd'),
        (dict(pooling='mean'), ValueError, "'adaptive', 'avg', 'max'"),
        (dict(pooling='max'), ValueError, 'n_pool=1'),
        (dict(ten='yes'), ValueError, 'ten'),
        (dict(see_global=1), ValueError, 'see_global'),
        (dict(head=nn.Linear(3, 3)), TypeError, 'callable'),
        (dict(head=lambda dim: None), TypeError, 'nn.Module'),
        (dict(img_size=32), TypeError, 'img_size'),
    ],
    ids=str,
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        mte.wrap(zoo.build('plain'), **options)


@pytest.mark.parametrize(
    ('make', 'options', 'error', 'message'),
    [
        (lambda: nn.Linear(3, 3), {}, TypeError, 'timm model'),
        (lambda: None, {}, TypeError, 'timm model'),
        (wrap, {}, TypeError, 'is already wrapped'),
        (lambda: torch.compile(zoo.build('plain')), {}, TypeError, 'wrap the timm model itself'),
        (lambda: nn.DataParallel(zoo.build('plain')), {}, TypeError, 'wrap the timm model itself'),
        (lambda: 'vit-tiny-patch16-224', {}, ValueError, r'vit-tiny.*did you mean vit_tiny_patch16_224'),
        (lambda: zoo.build('convnext'), {}, ValueError, 'n_cls=0, n_pool=6'),
        (lambda: timm.create_model('crossvit_tiny_240'), {'n_cls': 0}, ValueError, 'no single spatial map'),
        (lambda: zoo.build('plain', num_classes=3), {'head': head}, ValueError, 'num_classes=0'),
        (lambda: zoo.build('plain', global_pool=''), {'n_cls': 0}, ValueError, 'pooling'),
        (lambda: zoo.build('convnext', global_pool=''), {'n_cls': 0}, ValueError, 'pooling'),
        (lambda: zoo.build('plain', patch_drop_rate=0.5), {}, ValueError, 'patch_drop_rate'),
    ],
)
def test_bad_models_are_named(make, options, error, message):
    with pytest.raises(error, match=message):
        mte.wrap(make(), **options)


def test_bad_images_are_named_and_what_is_possible_runs():
    x = torch.randn(2, 3, 32, 32)
    wrap(build={'patch_drop_rate': 0.5}, n_pool=0)(x)
    with pytest.raises(ValueError, match='non-empty list'):
        wrap()([])
    with pytest.raises(ValueError, match=r'\(3, 32, 32\)'):
        wrap()(x[0])
    distilled = zoo.build('distilled', num_classes=3, dynamic_img_size=True).train()
    distilled.set_distilled_training(True)
    assert isinstance(mte.wrap(distilled)(x).output, tuple)
    with pytest.raises(ValueError, match='set_distilled_training'):
        mte.wrap(distilled)([x])


class Doubled(timm.models.VisionTransformer):
    def forward_features(self, x, **kwargs):
        return 2 * super().forward_features(x, **kwargs)


class Normalized(timm.models.ResNet):
    def forward(self, x):
        return nn.functional.normalize(super().forward(x))


def test_a_class_of_ones_own_that_computes_more_is_refused():
    small = dict(num_classes=0, **zoo.VIT)
    resnet = Normalized(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=0)
    resnet.pretrained_cfg = {'input_size': (3, 64, 64)}
    for model, tokens in ((Doubled(**small), {}), (resnet, {'n_cls': 0})):
        with pytest.raises(ValueError, match='its own forward computes something else'):
            mte.wrap(model, **tokens)
    mte.wrap(type('Named', (timm.models.VisionTransformer,), {})(**small))
    mte.wrap(Doubled(**small), n_cls=0)  # runs its own forward_features
    with pytest.raises(ValueError, match='its own forward computes something else'):
        mte.wrap(InTraining(**small))


def test_a_classifier_that_was_replaced_by_hand_is_named():
    model = timm.create_model(zoo.NAME, num_classes=10, **zoo.VIT)
    model.head = nn.Identity()
    for options in ({}, {'head': lambda dim: nn.Linear(dim, 3)}):
        with pytest.raises(ValueError, match=r'reset_classifier\(0\)'):
            mte.wrap(model, **options)


@pytest.mark.parametrize('classes', [0, 10])
def test_a_projection_in_the_classifiers_place_is_refused(classes):
    own = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 10))
    model = timm.create_model(zoo.NAME, num_classes=classes, **zoo.VIT)
    wrapped = mte.wrap(timm.create_model(zoo.NAME, num_classes=classes, **zoo.VIT))
    model.head = own
    for put in (lambda: mte.wrap(model), lambda: setattr(wrapped, 'head', own)):
        with pytest.raises(ValueError, match='pass it as head='):
            put()
    model.head = nn.Linear(48, 3)
    with pytest.raises(ValueError, match=r'reset_classifier\('):
        mte.wrap(model)


@pytest.mark.parametrize('name', ['shvit_s1', 'efficientvit_m0'])
def test_architectures_without_classes_of_which_timm_fails_to_tell_the_classifier(name):
    with torch.device('meta'):
        assert mte.wrap(name, n_cls=0, num_classes=0).num_classes == 0


class InTraining(timm.models.VisionTransformer):
    def forward_features(self, x, **kwargs):
        return super().forward_features(x + torch.rand_like(x) if self.training else x, **kwargs)


def test_a_class_of_timm_that_was_changed_is_refused(monkeypatch):
    inner = timm.models.VisionTransformer.forward_features
    monkeypatch.setattr(timm.models.VisionTransformer, 'forward_features', lambda self, x, **k: 2 * inner(self, x, **k))
    model = timm.create_model(zoo.NAME, num_classes=0, **zoo.VIT)
    with pytest.raises(ValueError, match='replaced on the object or its class'):
        mte.wrap(model)
    assert not mte.wrap(timm.create_model(zoo.NAME, num_classes=0, **zoo.VIT), n_cls=0).eval().backbone.training


# --- teachers


@pytest.mark.parametrize('name', ('plain', 'swin'))
def test_a_teacher_computes_no_global_projection(name):
    student, x = wrapped_and_images(name, head=lambda dim: nn.Linear(dim, 5))
    teacher = mte.make_teacher(student)
    assert teacher is not student and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    teacher.aux.global_head.register_forward_hook(lambda *_: pytest.fail('the global head ran'))
    out = teacher([x, x])
    assert torch.equal(out.aux, student([x, x]).aux) and out.output is out.aux
    assert torch.equal(teacher(x).aux, student(x).aux)
    assert student(x).output.shape == (2, 5) and not student.aux.is_teacher


def test_a_teacher_with_a_classifier_teaches_by_its_auxiliary_logits():
    student, x = wrapped_and_images(num_classes=3)
    teacher = mte.make_teacher(student)
    ours, theirs = teacher(x), student(x)
    assert torch.equal(ours.aux, theirs.aux) and torch.equal(ours.tokens.global_token, theirs.tokens.global_token)
    assert teacher([x, x]).output.shape == (4, 3)
    teacher.reset_classifier(5)  # which does not learn either
    assert not any(p.requires_grad for p in teacher.aux.parameters())
    with pytest.raises(TypeError, match='student: '):
        mte.make_teacher(student.backbone)
