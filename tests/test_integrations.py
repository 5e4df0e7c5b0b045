"""What the patches call, on look-alikes of the SSL repositories' modules; tests/test_upstream.py runs the real ones."""

import copy
from argparse import Namespace

import lookalikes as like
import pytest
import timm
import torch
import torchvision
from slow_form import dense_mask
from torch import nn
from torch.testing import assert_close

import mte_timm as mte
from mte_timm.integrations import dino, ibot, moby, moco_v3
from mte_timm.integrations.old_timm import tolerant
from mte_timm.integrations.options import config_and_weight, config_for, parse_options

IMAGES = (3, 32, 48)
GRID = (4, 6)
DEFAULTS = dict(mte=[''], out_dim=20, use_bn_in_head=False, norm_last_layer=True, output_dir='.', load_from=None)
DEFAULTS |= dict(patch_out_dim=20, norm_in_head=None, act_in_head='gelu', shared_head=False, shared_head_teacher=True)


def arguments(**kwargs):
    return Namespace(**DEFAULTS | kwargs)


def pictures(n=4):
    return torch.randn(n, *IMAGES)


def crops():
    return [pictures() for _ in range(2)] + [torch.randn(4, 3, 16, 16) for _ in range(3)]


# --- backbones


@pytest.mark.parametrize('see_global', (False, True))
@pytest.mark.parametrize('kwargs', ({}, {'scaled': True}, {'mean_pooling': True}), ids=str)
def test_ssl_vit_equals_its_own_forward_and_the_dense_mask(kwargs, see_global):
    model = like.ViT(**kwargs) if 'mean_pooling' not in kwargs else like.MaskedViT(False, **kwargs)
    model.return_all_tokens = False
    wrapped = mte.wrap(model.double(), see_global=see_global)
    x, norm = pictures(2).double(), model.fc_norm or nn.Identity()
    out = wrapped(x)
    assert_close(out.output, model.tokens(x)[:, 0], rtol=1e-12, atol=1e-12)
    assert_close(out.tokens.patches, norm(model.tokens(x)[:, 1:]), rtol=1e-12, atol=1e-12)
    assert out.tokens.grid == GRID and out.tokens.global_token is out.output
    seen = wrapped.adapter(model, x, wrapped.aux.tokens(len(x)), see_global).aux_cls
    joint = torch.cat([model.prepare_tokens(x), wrapped.aux.cls_tokens.expand(2, -1, -1)], dim=1)
    for block in model.blocks:
        joint = block(joint, dense_mask(25, 4, not see_global))
    expected = norm(model.norm(joint[:, 25:]))
    assert_close(seen, expected, rtol=1e-10, atol=1e-10)
    own = (*model.parameters(), wrapped.aux.cls_tokens)
    grads = [torch.autograd.grad(s.square().sum(), own, allow_unused=True) for s in (seen, expected)]
    for a, b in zip(*grads):
        assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)
    with torch.no_grad():
        wrapped.aux.cls_tokens.normal_(std=100)
    after = wrapped(x)
    assert torch.equal(out.output, after.output) and torch.equal(out.tokens.patches, after.tokens.patches)
    assert not torch.equal(out.tokens.aux_cls, after.tokens.aux_cls)


class ScaledBlock(like.Block):
    def forward(self, x, allowed=None):
        return super().forward(x, allowed) * 1.01


class UnitResNet(torchvision.models.ResNet):
    def _forward_impl(self, x):
        return nn.functional.normalize(super()._forward_impl(x))


class ScaledSwin(like.Swin):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('kind', ('first block', 'last block', UnitResNet, ScaledSwin))
def test_models_whose_own_forward_does_more_than_their_parts_are_refused(kind):
    if isinstance(kind, str):
        model = like.ViT()
        model.blocks[0 if 'first' in kind else 2] = ScaledBlock()
    else:
        resnet = (torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        model = kind(*resnet) if kind is UnitResNet else kind()
    with pytest.raises(ValueError, match='computes something else with them'):
        mte.wrap(model, n_cls=0)


def test_stochastic_depth_drops_as_in_the_models_own_forward():
    model, x = like.ViT(drop=0.5).train(), pictures(16)
    wrapped = mte.wrap(model)
    torch.manual_seed(3)
    out = wrapped(x).output
    torch.manual_seed(3)
    assert_close(out, model(x))
    assert not torch.allclose(out, model.eval()(x))


def test_masks_reach_the_backbone_as_its_own_forward_decides():
    model = like.MaskedViT()
    wrapped = mte.wrap(model)
    x, mask = pictures(2), torch.rand(2, *GRID) > 0.5
    assert_close(wrapped.adapter(model, x, wrapped.aux.tokens(2), mask=mask).patches, model(x, mask)[:, 1:])
    with pytest.raises(ValueError, match='mask: this model'):
        wrapped(x)
    model.masked_im_modeling = False  # as the script does for local crops
    assert_close(wrapped(x).output, model(x))
    for plain in (like.ViT(), timm.create_model('test_vit', num_classes=0)):
        with pytest.raises(TypeError, match=r'mask: (ViT|VisionTransformer) takes images alone'):
            mte.wrap(plain).adapter(plain, x, mask=mask)


@pytest.mark.parametrize('make', (like.Swin, like.TokenSwin))
def test_ssl_swin(make):
    model, x = make(), pictures(2)
    out = mte.wrap(model, n_cls=0)(x)
    assert_close(out.output, model(x))
    assert_close(out.tokens.patches, model.patches(x))
    assert out.tokens.grid == GRID and out.tokens.pooled.shape == (2, 6, like.DIM)
    with pytest.raises(ValueError, match='n_cls=4: '):
        mte.wrap(model)


@pytest.mark.parametrize('classes', (0, 7))
def test_torchvision_resnet(classes):
    model = torchvision.models.resnet18(num_classes=classes or 1000)
    if not classes:
        model.fc = nn.Identity()
    twin, wrapped = copy.deepcopy(model), mte.wrap(model, n_cls=0)
    x = torch.randn(4, 3, 64, 96)
    out = wrapped(x)
    assert torch.equal(out.output, twin(x)) and out.aux.shape == (4, classes or 512)
    assert out.tokens.global_token.shape == (4, 512) and out.tokens.grid == (2, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers()))
    assert mte.strip(wrapped) is model
    if classes:
        mte.MTECrossEntropy()(out, torch.tensor([0, 1, 2, 3])).backward()


# --- DINO and iBOT


def dino_pair(**kwargs):
    args = arguments(**kwargs)
    student, teacher = dino.add_mte(
        *(like.MultiCropWrapper(like.ViT(), like.Head(like.DIM, 20)) for _ in range(2)), args
    )
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False), args


def ibot_pair(make=like.MaskedViT, masked_student=True, masked_teacher=False, **kwargs):
    args = arguments(**kwargs)
    pairs = ((masked_student, False), (masked_teacher, True))
    wrappers = [like.MultiCropWrapper(make(m), like.PatchHead(like.DIM, 20, 20, shared_head=s)) for m, s in pairs]
    return *ibot.add_mte(*wrappers, args), args


def test_dino_step():
    student, teacher, args = dino_pair()
    names = [n for n, _ in student.named_parameters()]
    assert names == [n for n, _ in teacher.named_parameters()]  # the script's zip of parameters updates by position
    assert {f'backbone.{k}' for k in like.ViT().state_dict()} <= student.state_dict().keys()  # as in its checkpoints
    views, host = crops(), like.CentredLoss(20, 5)
    alone, criterion = copy.deepcopy(host), dino.loss(host, args)
    for step in range(3):
        s, t = student(views), teacher(views[:2])
        loss, before = criterion(s, t, step), copy.deepcopy(alone)
        assert_close(loss, (alone(s.aux, t.aux, step) + before(s.output, t.aux, step)) / 2)
        assert torch.equal(host.center, alone.center)  # the host's own single update
    for part in ('output', 'aux'):  # crops in their order
        assert_close(getattr(s, part), torch.cat([getattr(student(view), part) for view in views]))
    loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    last = [p for n, p in student.named_parameters() if 'last_layer' in n]
    assert len(last) == 2 and not last[0].requires_grad  # one prototype layer, found by the name the script looks for
    assert student.aux.global_head.last_layer(torch.randn(1, 16)).shape == (1, 20)


def test_dino_options_and_weight():
    student, _, args = dino_pair(mte=['', 'n_cls=2,n_pool=3', 'weight=0.25'])
    assert student.config.n_cls == 2 and len(student.aux.heads) == 5
    assert dino.loss(like.CentredLoss(20, 2), args).weight == 0.25


@pytest.mark.parametrize('norm_last_layer', (True, False))
def test_dino_heads_are_made_as_the_script_makes_them_and_can_be_synchronized(norm_last_layer):
    student, teacher, _ = dino_pair(norm_last_layer=norm_last_layer, use_bn_in_head=True)
    for model in (student, teacher):
        heads = [model.aux.global_head, *model.aux.heads]
        assert all(any(isinstance(m, nn.BatchNorm1d) for m in head.modules()) for head in heads)
        assert all(isinstance(head.last_layer, nn.Identity) for head in model.aux.heads)
    assert student.aux.global_head.last_layer.parametrizations.weight.original0.requires_grad != norm_last_layer
    before = student.state_dict()
    student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 11 and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert student.state_dict().keys() == before.keys()


def test_heads_with_synchronized_norms_are_not_run_to_check_them():
    class Forward(nn.SyncBatchNorm):
        def forward(self, x):
            raise ValueError('expected input tensor to be on GPU')

    def head(dim):
        made = like.Head(dim, 20)
        made.mlp.append(Forward(16))
        return made

    wrapped = mte.wrap(like.ViT(), head=head)
    assert all(isinstance(h.last_layer, nn.Identity) for h in wrapped.aux.heads)


def test_a_run_without_the_flag_is_not_gone_on_with(tmp_path):
    torch.save({'student': {'module.backbone.cls_token': torch.zeros(1)}}, tmp_path / 'checkpoint.pth')
    with pytest.raises(ValueError, match='is of a run without --mte'):
        dino_pair(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match='is of a run without --mte'):
        ibot_pair(output_dir=str(tmp_path), load_from='checkpoint.pth')
    ibot_pair(output_dir=str(tmp_path))
    torch.save({'student': dino_pair()[0].state_dict()}, tmp_path / 'checkpoint.pth')
    dino_pair(output_dir=str(tmp_path))


def test_ibot_step_counts_the_loss_of_masked_patches_once():
    student, teacher, args = ibot_pair()
    host, views = like.CentredPatchLoss(20, 20, 5), crops()
    alone, criterion = copy.deepcopy(host), ibot.loss(host, args)
    for epoch in range(2):
        masks = [torch.rand(4, *GRID) > 0.6 for _ in range(2)]
        (t, t_patch), (s, s_patch) = teacher(views[:2]), student(views[:2], mask=masks)
        student.backbone.masked_im_modeling = False
        local = student(views[2:])[0]
        student.backbone.masked_im_modeling = True
        assert torch.equal(torch.cat(t.chunk(2)), t.aux)  # the script's statistics of the teacher are its ensemble's
        assert torch.equal(torch.cat(s.chunk(2)), s.output) and not torch.equal(s.output, s.aux)
        total, before = criterion((s, s_patch), (t, t_patch), local, masks, epoch), copy.deepcopy(alone)
        ensemble = alone((s.aux, s_patch), (t.aux, t_patch), local.aux, masks, epoch)
        distill = before((s.output, s_patch), (t.aux, t_patch), local.output, masks, epoch)
        assert_close(total['cls'], (ensemble['cls'] + distill['cls']) / 2)
        assert_close(total['patch'], ensemble['patch'])
        assert_close(total['loss'], total['cls'] + total['patch'])
        for ours, theirs in zip(host.buffers(), alone.buffers()):  # both centers: the host's own single update
            assert torch.equal(ours, theirs) and ours.isfinite().all()
    inputs = [p for p in student.parameters() if p.requires_grad]
    ours = torch.autograd.grad(total['loss'], inputs, retain_graph=True)
    theirs = torch.autograd.grad((ensemble['cls'] + distill['cls']) / 2 + ensemble['patch'], inputs)
    for a, b in zip(ours, theirs):
        assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_ibot_heads_are_made_as_the_script_makes_them():
    options = {'norm_in_head': 'bn', 'act_in_head': 'relu', 'norm_last_layer': False, 'patch_out_dim': 7}
    student, teacher, args = ibot_pair(mte=['weight=3'], **options)
    for model in (student, teacher):
        heads = [model.aux.global_head, *model.aux.heads]
        assert all(sum(isinstance(m, (nn.BatchNorm1d, nn.ReLU)) for m in head.modules()) == 2 for head in heads)
        assert all(isinstance(h.last_layer, nn.Identity) and isinstance(h.last_layer2, nn.Identity) for h in heads[1:])
    head, of_teacher = student.aux.global_head, teacher.aux.global_head
    assert head.last_layer.parametrizations.weight.original0.requires_grad and head.last_layer2 is not head.last_layer
    assert head.last_layer2.out_features == 7 and of_teacher.last_layer2 is of_teacher.last_layer
    assert ibot.loss(like.CentredPatchLoss(20, 7, 2), args).weight == 3
    shared, apart, _ = ibot_pair(shared_head=True, shared_head_teacher=False)
    assert shared.aux.global_head.last_layer2 is shared.aux.global_head.last_layer
    assert apart.aux.global_head.last_layer2 is not apart.aux.global_head.last_layer


def test_ibot_global_output_is_the_hosts_own_head_on_all_tokens():
    student, x = ibot_pair(masked_student=False)[0], pictures(2)
    (cls, _), patches = student([x])
    expected = student.aux.global_head(student.backbone(x))
    assert_close(cls, expected[0])
    assert_close(patches, expected[1])


def test_ibot_swin_and_its_masks():
    student, teacher, args = ibot_pair(like.TokenSwin, masked_teacher=True)
    assert student.config.n_cls == 0 and len(student.aux.heads) == 6
    views, masks = crops()[:2], [torch.rand(4, *GRID) > 0.6 for _ in range(2)]
    loss = ibot.loss(like.CentredPatchLoss(20, 20, 2), args)(student(views, mask=masks), teacher(views), None, masks, 0)
    assert loss['loss'].isfinite()
    unmasked = ibot_pair(like.TokenSwin, masked_student=False)[0]  # its own forward would use any mask it gets
    assert torch.equal(unmasked(views, mask=masks)[1], unmasked(views)[1])


# --- MoCo v3 and MoBY


def moco_vit():
    model = timm.create_model('test_vit', num_classes=0, embed_dim=like.DIM, num_heads=3, depth=2, img_size=(32, 48))
    model.num_classes, model.head = 99, like.mlp()  # MoCo v3 asks for classes and puts its projector there
    return model


def moco_resnet():
    model = torchvision.models.resnet18()
    model.fc = like.mlp(512, affine=False)
    return model


def apart(*online, std):
    """Online parts that their momentum copies differ from."""
    with torch.no_grad():
        for p in (p for part in online for p in part.parameters()):
            p.add_(torch.randn_like(p) * std)


@pytest.mark.parametrize('encoder', (moco_vit, moco_resnet))
def test_moco_step(encoder):
    model = like.MoCo(encoder).train()
    plain = model.state_dict().keys()
    moco_v3.add_mte(model, arguments(mte=['weight=0.5']))
    assert plain <= model.state_dict().keys()  # so main_lincls.py and convert_to_deit.py read it
    assert all(k.startswith('mte.') for k in model.state_dict().keys() - plain)
    assert len(model.mte.online.heads) == (10 if encoder is moco_vit else 6)
    first, second, *_ = (h[0].weight for h in model.mte.online.heads)
    assert not torch.equal(first, second) and not torch.equal(model.mte.predictor[0].weight, model.predictor[0].weight)
    apart(model.base_encoder, model.mte.online, std=0.02)
    twin, x = copy.deepcopy(model), (pictures(8), pictures(8))
    loss = model(*x, 0.9)
    loss.backward()
    for part, host in (('online', 'base_encoder'), ('target', 'momentum_encoder')):
        for p in (*getattr(model.mte, part).parameters(), *getattr(model, host).parameters()):
            assert (p.grad is not None) == (part == 'online')

    q = [twin.mte.run(twin.mte.online, twin.base_encoder, view) for view in x]
    like.follow(0.9, (twin.base_encoder, twin.momentum_encoder), (twin.mte.online, twin.mte.target))
    with torch.no_grad():
        k = [twin.mte.run(twin.mte.target, twin.momentum_encoder, view).aux for view in x]
    expected = 0
    for out, key in ((q[0], k[1]), (q[1], k[0])):
        ensemble = twin.contrastive_loss(twin.mte.predictor(out.aux), key)
        expected += (ensemble + 0.5 * twin.contrastive_loss(twin.predictor(out.output), key)) / 1.5
    assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        assert_close(ours, theirs, msg=name)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers()):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_moby_step_reads_the_queues_from_before_it_and_advances_queues_and_momentum_once():
    model, unit = like.MoBY(like.Swin).train(), nn.functional.normalize
    plain = model.state_dict().keys()
    moby.add_mte(model, ['weight=2'])
    assert plain <= model.state_dict().keys() and len(model.mte.online.heads) == 6
    apart(model.encoder, model.mte.online, std=0.05)
    for step in range(3):
        twin, x = copy.deepcopy(model), (pictures(), pictures())
        loss = model(*x)
        outs = [twin.mte.run(twin.mte.online, twin.encoder, view) for view in x]
        pairs = (twin.encoder, twin.encoder_k), (twin.projector, twin.projector_k), (twin.mte.online, twin.mte.target)
        like.follow(1 - 0.1 * (1 - step / 10), *pairs)
        with torch.no_grad():
            keys = [unit(twin.mte.run(twin.mte.target, twin.encoder_k, view).aux) for view in x]
        expected = 0
        for out, key, queue in ((outs[0], keys[1], twin.queue2), (outs[1], keys[0], twin.queue1)):
            ensemble = twin.contrastive_loss(unit(twin.mte.predictor(out.aux)), key, queue)
            distill = twin.contrastive_loss(unit(twin.predictor(twin.projector(out.output))), key, queue)
            expected += (ensemble + 2 * distill) / 3
        assert_close(loss, expected)
        twin._dequeue_and_enqueue(*keys)
        assert model.k == step + 1 and torch.equal(model.queue_ptr, twin.queue_ptr)
        assert_close(model.queue1, twin.queue1)
        assert_close(model.queue2, twin.queue2)
        for a, b in zip(model.parameters(), twin.parameters()):
            assert_close(a, b)
    loss.backward()
    online = (model.encoder, model.projector, model.predictor, model.mte.online, model.mte.predictor)
    assert all(p.grad is not None for part in online for p in part.parameters())


def test_moby_with_a_timm_vit_has_auxiliary_cls_tokens():
    options = {'num_classes': 0, 'embed_dim': like.DIM, 'num_heads': 3, 'depth': 1, 'img_size': (32, 48)}
    model = like.MoBY(lambda: timm.create_model('test_vit', **options))
    moby.add_mte(model, [''])
    assert model.mte.online.cls_tokens.shape == (1, 4, like.DIM)
    assert model(pictures(), pictures()).isfinite()


# --- options


@pytest.mark.parametrize('text', ('n_cls', 'tokens=3', 'n_cls=four', 'ten=maybe', '/data/imagenet'))
def test_bad_options_are_named(text):
    with pytest.raises(ValueError, match='--mte_options: '):
        parse_options([text])


@pytest.mark.parametrize('weight', ('-1', 'nan', 'inf'))
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match='weight='):
        moby.add_mte(like.MoBY(like.Swin), [f'weight={weight}'])


def test_auxiliary_cls_tokens_by_default_only_where_they_can_be():
    assert config_for(like.ViT(), ['']).n_cls == 4 and config_for(like.Swin(), ['']).n_cls == 0
    with pytest.raises(ValueError, match='n_cls=-1'):
        config_for(like.ViT(), ['n_cls=-1'])


def test_what_later_timm_has_dropped_is_supplied_and_what_it_adds_is_tolerated():
    from timm.data.transforms import _pil_interp
    from timm.models import vit_deit_small_patch16_224
    from timm.models.layers.helpers import to_2tuple

    assert to_2tuple(3) == (3, 3) and vit_deit_small_patch16_224(num_classes=0, depth=1).num_features == 384
    torchvision.transforms.Resize(8, interpolation=_pil_interp('bicubic'))

    def layer(a, b=2):
        return a, b

    assert tolerant(layer)(1, b=3, bias=True) == (1, 3)
    assert tolerant(lambda **others: others)(b=3) == {'b': 3}


@pytest.mark.parametrize('given', ('ture', 'n_cls=2', 4, 0.5, None))
def test_key_of_a_config_is_true_or_options(given):
    with pytest.raises(ValueError, match='pass mte=true, or options'):
        config_and_weight(given)
    assert config_and_weight(True) == config_and_weight({'n_cls': 4, 'weight': 1.0})
