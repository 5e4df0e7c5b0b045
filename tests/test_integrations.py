"""What the patches call, on look-alikes of the SSL repositories' modules."""

import copy
import subprocess
import sys
from argparse import Namespace

import lookalikes as like
import pytest
import timm
import torch
import torchvision
from torch import nn

import mte_timm as mte
from mte_timm.integrations import dino, ibot, moby, moco_v3
from mte_timm.integrations.old_timm import tolerant
from mte_timm.integrations.options import config_for, parse_options

IMAGES = (3, 32, 48)
GRID = (4, 6)


def arguments(**kwargs):
    given = {'mte': [''], 'out_dim': 20, 'use_bn_in_head': False, 'norm_last_layer': True}
    given |= {'patch_out_dim': 20, 'norm_in_head': None, 'act_in_head': 'gelu'}
    given |= {'output_dir': '.', 'load_from': None}
    return Namespace(**given | {'shared_head': False, 'shared_head_teacher': True} | kwargs)


def dense_run(model, tokens, observers, see_global):
    """Own tokens and observers in one sequence under the dense mask of paper Fig. 4."""
    n, k = tokens.shape[1], observers.shape[1]
    allowed = torch.ones(n + k, n + k, dtype=torch.bool)
    allowed[:n, n:] = False
    allowed[n:, 0] = see_global
    x = torch.cat([tokens, observers.expand(len(tokens), -1, -1)], dim=1)
    for block in model.blocks:
        x = block(x, allowed)
    return model.norm(x[:, n:])


# --- backbones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('see_global', (False, True))
@pytest.mark.parametrize('kwargs', ({}, {'scaled': True}, {'mean_pooling': True}), ids=str)
def test_ssl_vit_equals_its_own_forward_and_the_dense_mask(kwargs, see_global):
    model = like.ViT(**kwargs) if 'mean_pooling' not in kwargs else like.MaskedViT(False, **kwargs)
    model.return_all_tokens = False
    wrapped = mte.wrap(model.double(), see_global=see_global)
    x = torch.randn(2, *IMAGES, dtype=torch.float64)
    out = wrapped(x)
    norm = model.fc_norm or nn.Identity()
    torch.testing.assert_close(out.output, model.tokens(x)[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.tokens.patches, norm(model.tokens(x)[:, 1:]), rtol=1e-12, atol=1e-12)
    assert out.tokens.grid == GRID and out.tokens.global_token is out.output
    seen = wrapped.adapter(model, x, wrapped.aux.tokens(len(x)), see_global).aux_cls
    expected = norm(dense_run(model, model.prepare_tokens(x), wrapped.aux.cls_tokens, see_global))
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)
    own = (*model.parameters(), wrapped.aux.cls_tokens)
    ours = torch.autograd.grad(seen.square().sum(), own, allow_unused=True)
    theirs = torch.autograd.grad(expected.square().sum(), own, allow_unused=True)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b)


def test_ssl_vits_tokens_never_see_observers():
    wrapped = mte.wrap(like.ViT())
    x = torch.randn(2, *IMAGES)
    before = wrapped(x)
    with torch.no_grad():
        wrapped.aux.cls_tokens.normal_(std=100)
    after = wrapped(x)
    assert torch.equal(before.output, after.output) and torch.equal(before.tokens.patches, after.tokens.patches)
    assert not torch.equal(before.tokens.aux_cls, after.tokens.aux_cls)


@pytest.mark.parametrize('which', (0, 2))
def test_blocks_that_compute_something_else_are_refused(which):
    class Odd(like.Block):
        def forward(self, x, allowed=None):
            return super().forward(x, allowed) * 1.01

    model = like.ViT()
    model.blocks[which] = Odd()
    with pytest.raises(ValueError, match='computes something else with them'):
        mte.wrap(model)


def test_models_whose_own_forward_does_more_than_their_parts_are_refused():
    class UnitResNet(torchvision.models.ResNet):
        def _forward_impl(self, x):
            return nn.functional.normalize(super()._forward_impl(x))

    class ScaledSwin(like.Swin):
        def forward(self, x):
            return 2 * super().forward(x)

    block = torchvision.models.resnet.BasicBlock
    for model in (UnitResNet(block, [1, 1, 1, 1]), ScaledSwin()):
        with pytest.raises(ValueError, match='computes something else with them'):
            mte.wrap(model, n_cls=0)


def test_stochastic_depth_drops_as_in_the_models_own_forward():
    model = like.ViT(drop=0.5).train()
    wrapped = mte.wrap(model)
    x = torch.randn(16, *IMAGES)
    torch.manual_seed(3)
    out = wrapped(x).output
    torch.manual_seed(3)
    torch.testing.assert_close(out, model(x))
    assert not torch.allclose(out, model.eval()(x))


def test_masks_reach_the_backbone_as_its_own_forward_decides():
    model = like.MaskedViT()
    wrapped = mte.wrap(model)
    x, mask = torch.randn(2, *IMAGES), torch.rand(2, *GRID) > 0.5
    torch.testing.assert_close(
        wrapped.adapter(model, x, wrapped.aux.tokens(2), mask=mask).patches, model(x, mask)[:, 1:]
    )
    with pytest.raises(ValueError, match='mask: this model'):
        wrapped(x)
    model.masked_im_modeling = False  # as the script does for local crops
    torch.testing.assert_close(wrapped(x).output, model(x))
    for plain in (like.ViT(), timm.create_model('test_vit', num_classes=0)):
        with pytest.raises(TypeError, match=r'mask: (ViT|VisionTransformer) takes images alone'):
            mte.wrap(plain).adapter(plain, x, mask=mask)


@pytest.mark.parametrize('make', (like.Swin, like.TokenSwin))
def test_ssl_swin(make):
    model = make()
    out = mte.wrap(model, n_cls=0)(x := torch.randn(2, *IMAGES))
    torch.testing.assert_close(out.output, model(x))
    assert out.tokens.grid == GRID and out.tokens.pooled.shape == (2, 6, like.DIM)
    torch.testing.assert_close(out.tokens.patches, model._tokens(x))
    with pytest.raises(ValueError, match='n_cls=4: '):
        mte.wrap(model)


@pytest.mark.parametrize('classes', (0, 7))
def test_torchvision_resnet(classes):
    model = torchvision.models.resnet18(num_classes=classes or 1000)
    if not classes:
        model.fc = nn.Identity()
    twin = copy.deepcopy(model)
    wrapped = mte.wrap(model, n_cls=0)
    x = torch.randn(4, 3, 64, 96)
    out = wrapped(x)
    assert torch.equal(out.output, twin(x)) and out.aux.shape == (4, classes or 512)
    assert out.tokens.global_token.shape == (4, 512) and out.tokens.grid == (2, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers()))
    assert mte.strip(wrapped) is model
    if classes:
        mte.MTECrossEntropy()(out, torch.tensor([0, 1, 2, 3])).backward()


# --- DINO and iBOT -----------------------------------------------------------------------------------------------


def dino_pair(backbone=like.ViT, **kwargs):
    args = arguments(**kwargs)
    wrappers = [like.MultiCropWrapper(backbone(), like.Head(like.DIM, 20)) for _ in range(2)]
    student, teacher = dino.add_mte(*wrappers, args)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher, args


def views():
    return [torch.randn(4, *IMAGES) for _ in range(2)] + [torch.randn(4, 3, 16, 16) for _ in range(3)]


def test_dino_step():
    student, teacher, args = dino_pair()
    names = [n for n, _ in student.named_parameters()]
    assert names == [n for n, _ in teacher.named_parameters()]  # the script's zip of parameters updates by position
    crops = views()
    host = like.CentredLoss(20, 5)
    alone = copy.deepcopy(host)
    criterion = dino.loss(host, args)
    for step in range(3):
        s, t = student(crops), teacher(crops[:2])
        loss = criterion(s, t, step)
        before = copy.deepcopy(alone)
        ensemble, distill = alone(s.aux, t.aux, step), before(s.output, t.aux, step)
        torch.testing.assert_close(loss, (ensemble + distill) / 2)
        assert torch.equal(host.center, alone.center)  # the host's own single update
    loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    last = [p for n, p in student.named_parameters() if 'last_layer' in n]
    assert len(last) == 2 and not last[0].requires_grad  # one prototype layer, found by the name the script looks for
    assert student.aux.global_head.last_layer(torch.randn(1, 16)).shape == (1, 20)


def test_dino_crops_come_in_order():
    student, _, _ = dino_pair()
    crops = views()
    out = student(crops)
    one_by_one = [student(c) for c in crops]
    torch.testing.assert_close(out.output, torch.cat([o.output for o in one_by_one]))
    torch.testing.assert_close(out.aux, torch.cat([o.aux for o in one_by_one]))


def test_dino_options_and_weight():
    student, _, args = dino_pair(mte=['', 'n_cls=2,n_pool=3', 'weight=0.25'])
    assert student.config.n_cls == 2 and len(student.aux.heads) == 5
    assert dino.loss(like.CentredLoss(20, 2), args).weight == 0.25


@pytest.mark.parametrize('norm_last_layer', (True, False))
def test_dino_heads_are_made_as_the_script_makes_them(norm_last_layer):
    student, teacher, _ = dino_pair(norm_last_layer=norm_last_layer, use_bn_in_head=True)
    for model, frozen in ((student, norm_last_layer), (teacher, True)):
        heads = [model.aux.global_head, *model.aux.heads]
        assert all(any(isinstance(m, nn.BatchNorm1d) for m in head.modules()) for head in heads)
        if model is student:
            assert model.aux.global_head.last_layer.parametrizations.weight.original0.requires_grad != frozen
        assert all(isinstance(head.last_layer, nn.Identity) for head in model.aux.heads)


def test_a_run_without_the_flag_is_not_gone_on_with(tmp_path):
    torch.save({'student': {'module.backbone.cls_token': torch.zeros(1)}}, tmp_path / 'checkpoint.pth')
    with pytest.raises(ValueError, match='is of a run without --mte'):
        dino_pair(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match='is of a run without --mte'):
        ibot_pair(like.MaskedViT(), like.MaskedViT(), output_dir=str(tmp_path), load_from='checkpoint.pth')
    ibot_pair(like.MaskedViT(), like.MaskedViT(), output_dir=str(tmp_path))
    torch.save({'student': dino_pair()[0].state_dict()}, tmp_path / 'checkpoint.pth')
    dino_pair(output_dir=str(tmp_path))


def test_dino_checkpoint_has_the_backbone_under_the_hosts_names():
    student, _, _ = dino_pair()
    plain = like.MultiCropWrapper(like.ViT(), like.Head(like.DIM, 20)).state_dict()
    assert {k for k in plain if k.startswith('backbone.')} <= student.state_dict().keys()


def test_heads_with_batch_norm_become_synchronized():
    student, _, _ = dino_pair(use_bn_in_head=True)
    before = student.state_dict()
    student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 11 and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert student.state_dict().keys() == before.keys()


def ibot_pair(student_backbone, teacher_backbone, **kwargs):
    args = arguments(**kwargs)
    wrappers = [
        like.MultiCropWrapper(student_backbone, like.PatchHead(like.DIM, 20, 20)),
        like.MultiCropWrapper(teacher_backbone, like.PatchHead(like.DIM, 20, 20, shared_head=True)),
    ]
    return (*ibot.add_mte(*wrappers, args), args)


def ibot_outputs(student, teacher):
    crops = views()
    masks = [torch.rand(4, *GRID) > 0.6 for _ in range(2)]
    t, s = teacher(crops[:2]), student(crops[:2], mask=masks)
    student.backbone.masked_im_modeling = False
    local = student(crops[2:])[0]
    student.backbone.masked_im_modeling = True
    return s, t, local, masks


def test_ibot_step_counts_the_loss_of_masked_patches_once():
    student, teacher, args = ibot_pair(like.MaskedViT(), like.MaskedViT(masked_im_modeling=False))
    host = like.CentredPatchLoss(20, 20, 5)
    alone = copy.deepcopy(host)
    criterion = ibot.loss(host, args)
    for epoch in range(2):
        (s, s_patch), (t, t_patch), local, masks = ibot_outputs(student, teacher)
        total = criterion((s, s_patch), (t, t_patch), local, masks, epoch)
        before = copy.deepcopy(alone)
        ensemble = alone((s.aux, s_patch), (t.aux, t_patch), local.aux, masks, epoch)
        distill = before((s.output, s_patch), (t.aux, t_patch), local.output, masks, epoch)
        torch.testing.assert_close(total['cls'], (ensemble['cls'] + distill['cls']) / 2)
        torch.testing.assert_close(total['patch'], ensemble['patch'])
        torch.testing.assert_close(total['loss'], total['cls'] + total['patch'])
        for ours, theirs in zip(host.buffers(), alone.buffers()):  # both centers: the host's own single update
            assert torch.equal(ours, theirs) and ours.isfinite().all()
    inputs = [p for p in student.parameters() if p.requires_grad]
    ours = torch.autograd.grad(total['loss'], inputs, retain_graph=True)
    theirs = torch.autograd.grad((ensemble['cls'] + distill['cls']) / 2 + ensemble['patch'], inputs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_ibot_heads_are_made_as_the_script_makes_them():
    options = {'norm_in_head': 'bn', 'act_in_head': 'relu', 'norm_last_layer': False, 'patch_out_dim': 7}
    student, teacher, args = ibot_pair(like.MaskedViT(), like.MaskedViT(), mte=['weight=3'], **options)
    for model in (student, teacher):
        heads = [model.aux.global_head, *model.aux.heads]
        assert all(sum(isinstance(m, (nn.BatchNorm1d, nn.ReLU)) for m in head.modules()) == 2 for head in heads)
        assert all(isinstance(h.last_layer, nn.Identity) and isinstance(h.last_layer2, nn.Identity) for h in heads[1:])
    head = student.aux.global_head
    assert head.last_layer.parametrizations.weight.original0.requires_grad and head.last_layer2 is not head.last_layer
    of_teacher = teacher.aux.global_head
    assert head.last_layer2.out_features == 7 and of_teacher.last_layer2 is of_teacher.last_layer
    assert ibot.loss(like.CentredPatchLoss(20, 7, 2), args).weight == 3
    shared, apart, _ = ibot_pair(like.MaskedViT(), like.MaskedViT(), shared_head=True, shared_head_teacher=False)
    assert shared.aux.global_head.last_layer2 is shared.aux.global_head.last_layer
    assert apart.aux.global_head.last_layer2 is not apart.aux.global_head.last_layer


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


def test_ibot_statistics_of_the_teacher_are_its_ensembles():
    student, teacher, _ = ibot_pair(like.MaskedViT(), like.MaskedViT(masked_im_modeling=False))
    (s, _), (t, _), _, _ = ibot_outputs(student, teacher)
    assert torch.equal(torch.cat(t.chunk(2)), t.aux)
    assert torch.equal(torch.cat(s.chunk(2)), s.output) and not torch.equal(s.output, s.aux)


def test_ibot_global_output_is_the_hosts_own_head_on_all_tokens():
    backbone = like.MaskedViT(masked_im_modeling=False)
    student, _, _ = ibot_pair(backbone, like.MaskedViT(masked_im_modeling=False))
    x = torch.randn(2, *IMAGES)
    (cls, _), patches = student([x])
    expected = student.aux.global_head(backbone(x))
    torch.testing.assert_close(cls, expected[0])
    torch.testing.assert_close(patches, expected[1])


def test_ibot_swin():
    student, teacher, args = ibot_pair(like.TokenSwin(), like.TokenSwin())
    assert student.config.n_cls == 0 and len(student.aux.heads) == 6
    crops, masks = views()[:2], [torch.rand(4, *GRID) > 0.6 for _ in range(2)]
    loss = ibot.loss(like.CentredPatchLoss(20, 20, 2), args)(student(crops, mask=masks), teacher(crops), None, masks, 0)
    assert loss['loss'].isfinite()


def test_ibot_swin_leaves_masks_out_where_the_script_was_told_to():
    model = like.TokenSwin(masked_im_modeling=False)  # its own forward would use any mask it gets
    student, _, _ = ibot_pair(model, like.TokenSwin(masked_im_modeling=False))
    x, mask = torch.randn(2, *IMAGES), torch.rand(2, *GRID) > 0.5
    assert torch.equal(student([x], mask=[mask])[1], student([x])[1])


# --- MoCo v3 and MoBY --------------------------------------------------------------------------------------------


def moco_vit():
    model = timm.create_model('test_vit', num_classes=0, embed_dim=like.DIM, num_heads=3, depth=2, img_size=(32, 48))
    model.num_classes, model.head = 99, like.mlp()  # MoCo v3 asks for classes and puts its projector there
    return model


def moco_resnet():
    model = torchvision.models.resnet18()
    model.fc = nn.Sequential(nn.Linear(512, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12))
    return model


@pytest.mark.parametrize('encoder', (moco_vit, moco_resnet))
def test_moco_step(encoder):
    model = like.MoCo(encoder).train()
    plain = model.state_dict().keys()
    moco_v3.add_mte(model, arguments(mte=['weight=0.5']))
    assert plain <= model.state_dict().keys()  # so main_lincls.py and convert_to_deit.py read it
    assert all(k.startswith('mte.') for k in model.state_dict().keys() - plain)
    tokens = 10 if encoder is moco_vit else 6
    assert len(model.mte.online.heads) == tokens
    heads = [h[0].weight for h in model.mte.online.heads]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(
        model.mte.predictor[0].weight, model.predictor[0].weight
    )

    with torch.no_grad():  # momentum copies apart from the online ones
        for p in (*model.base_encoder.parameters(), *model.mte.online.parameters()):
            p.add_(torch.randn_like(p) * 0.02)
    twin = copy.deepcopy(model)
    x1, x2 = torch.randn(8, *IMAGES), torch.randn(8, *IMAGES)
    loss = model(x1, x2, 0.9)
    loss.backward()
    for part, host in (('online', 'base_encoder'), ('target', 'momentum_encoder')):
        for p in (*getattr(model.mte, part).parameters(), *getattr(model, host).parameters()):
            assert (p.grad is not None) == (part == 'online')

    q = [twin.mte.run(twin.mte.online, twin.base_encoder, x) for x in (x1, x2)]
    with torch.no_grad():
        for online, target in ((twin.base_encoder, twin.momentum_encoder), (twin.mte.online, twin.mte.target)):
            for b, k in zip(online.parameters(), target.parameters()):
                k.copy_(0.9 * k + 0.1 * b)
        k = [twin.mte.run(twin.mte.target, twin.momentum_encoder, x).aux for x in (x1, x2)]
    expected = 0
    for a, b in ((0, 1), (1, 0)):
        ensemble = twin.contrastive_loss(twin.mte.predictor(q[a].aux), k[b])
        expected += (ensemble + 0.5 * twin.contrastive_loss(twin.predictor(q[a].output), k[b])) / 1.5
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs, msg=name)
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_moby_step_advances_queues_and_momentum_once():
    model = like.MoBY(like.Swin).train()
    plain = model.state_dict().keys()
    moby.add_mte(model, [''])
    assert plain <= model.state_dict().keys() and len(model.mte.online.heads) == 6
    with torch.no_grad():
        for p in (*model.encoder.parameters(), *model.mte.online.parameters()):
            p.add_(torch.randn_like(p) * 0.05)
    for step in range(3):
        twin = copy.deepcopy(model)
        x1, x2 = torch.randn(4, *IMAGES), torch.randn(4, *IMAGES)
        loss = model(x1, x2)
        momentum = 1 - 0.1 * (1 - step / 10)
        with torch.no_grad():
            pairs = (('encoder', 'encoder_k'), ('projector', 'projector_k'))
            updated = [(getattr(twin, a), getattr(twin, b)) for a, b in pairs] + [(twin.mte.online, twin.mte.target)]
            for online, target in updated:
                for b, k in zip(online.parameters(), target.parameters()):
                    k.copy_(momentum * k + (1 - momentum) * b)
            keys = [twin.mte.run(twin.mte.target, twin.encoder_k, x).aux for x in (x1, x2)]
            keys = [nn.functional.normalize(k, dim=1) for k in keys]
            twin._dequeue_and_enqueue(*keys)
        assert model.k == step + 1 and torch.equal(model.queue_ptr, twin.queue_ptr)
        torch.testing.assert_close(model.queue1, twin.queue1)
        torch.testing.assert_close(model.queue2, twin.queue2)
        for a, b in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(a, b)
    loss.backward()
    online = (model.encoder, model.projector, model.predictor, model.mte.online, model.mte.predictor)
    assert all(p.grad is not None for part in online for p in part.parameters())


def test_moby_losses_read_the_queues_from_before_the_step():
    model = like.MoBY(like.Swin).eval()
    moby.add_mte(model, ['weight=2'])
    twin = copy.deepcopy(model)
    x1, x2 = torch.randn(4, *IMAGES), torch.randn(4, *IMAGES)
    loss = model(x1, x2)
    unit = nn.functional.normalize
    # in eval mode momentum copies equal the online ones
    outs = [twin.mte.run(twin.mte.online, twin.encoder, x) for x in (x1, x2)]
    keys = [unit(o.aux) for o in outs]
    expected = 0
    for a, b, queue in ((0, 1, twin.queue2), (1, 0, twin.queue1)):
        ensemble = twin.contrastive_loss(unit(twin.mte.predictor(outs[a].aux)), keys[b], queue)
        distill = twin.contrastive_loss(unit(twin.predictor(twin.projector(outs[a].output))), keys[b], queue)
        expected += (ensemble + 2 * distill) / 3
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize('weight', ('-1', 'nan', 'inf'))
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match='weight='):
        moby.add_mte(like.MoBY(like.Swin), [f'weight={weight}'])


def test_moby_with_a_timm_vit_has_auxiliary_cls_tokens():
    options = {'num_classes': 0, 'embed_dim': like.DIM, 'num_heads': 3, 'depth': 1, 'img_size': (32, 48)}
    model = like.MoBY(lambda: timm.create_model('test_vit', **options))
    moby.add_mte(model, [''])
    assert model.mte.online.cls_tokens.shape == (1, 4, like.DIM)
    assert model(torch.randn(4, *IMAGES), torch.randn(4, *IMAGES)).isfinite()


# --- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('text', ('n_cls', 'tokens=3', 'n_cls=four', 'ten=maybe', '/data/imagenet'))
def test_bad_options_are_named(text):
    with pytest.raises(ValueError, match='--mte_options: '):
        parse_options([text])


def test_auxiliary_cls_tokens_by_default_only_where_they_can_be():
    assert config_for(like.ViT(), ['']).n_cls == 4 and config_for(like.Swin(), ['']).n_cls == 0
    with pytest.raises(ValueError, match='n_cls=-1'):
        config_for(like.ViT(), ['n_cls=-1'])


def test_tolerant_drops_only_what_the_signature_lacks():
    def layer(a, b=2):
        return a, b

    assert tolerant(layer)(1, b=3, bias=True) == (1, 3)
    assert tolerant(lambda **others: others)(b=3) == {'b': 3}


def test_old_names_are_there():
    code = (
        'import mte_timm.integrations.old_timm\n'
        'from timm.models.layers.helpers import to_2tuple\n'
        'from timm.models import vit_deit_small_patch16_224\n'
        'from timm.data.transforms import _pil_interp\n'
        'assert vit_deit_small_patch16_224(num_classes=0, depth=1).num_features == 384\n'
        'import torchvision; torchvision.transforms.Resize(8, interpolation=_pil_interp("bicubic"))\n'
    )
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)
