"""The study: runs that can be killed, fair pairs, evaluation held to its definition, and the whole path."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import adjust_saturation, gaussian_blur, resized_crop

import mte_timm as mte
from benchmarks import images as data
from benchmarks import records
from benchmarks.images import open_images
from benchmarks.intervals import difference
from benchmarks.study import __main__ as study
from benchmarks.study.compare import SAME, rows_of
from benchmarks.study.evaluate import (
    class_attention,
    concatenated,
    features,
    fine_tuned,
    knn,
    patch_accuracies,
    random_token_accuracies,
    side_by_side,
)
from benchmarks.study.experiment import runs_of
from benchmarks.study.methods import METHODS
from benchmarks.study.plans import fashion_mnist, photographs, vit_s
from benchmarks.study.report import in_words, report
from benchmarks.study.train import Feed, Run, make_backbone, make_method, make_optimizer, train
from benchmarks.study.views import View, blurring, coloring, luma, make_view, random_boxes, resized_crops, resizing
from mte_timm import analysis

OPTIONS = {'n_cls': 1, 'n_pool': 1}
PLAN = fashion_mnist.PLAN
EXPERIMENTS = PLAN.experiments


def few(train=64, test=32):
    return open_images('sample', None, (train, test))


def short(method='moco_v3', options=OPTIONS, **kwargs):
    model = 'swin' if method == 'moby' else 'vit'
    options = {**options, 'n_cls': 0} if options and model == 'swin' else options
    return Run(method, options, epochs=2, batch_size=16, model=model, **kwargs)


@pytest.mark.parametrize('options', [None, OPTIONS], ids=['plain', 'mte'])
@pytest.mark.parametrize(
    'method', ['dino', 'ibot', 'hssl', 'moby', *(pytest.param(m, marks=pytest.mark.slow) for m in ('byol', 'moco_v3'))]
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(method, options, tmp_path, monkeypatch):
    run, images = short(method, options), few()
    whole, state = train(run, images, tmp_path / 'whole')
    kind, steps = METHODS[method], []

    def killed(self, progress, after_step=kind.after_step):
        after_step(self, progress)
        steps.append(progress)
        if len(steps) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kind, 'after_step', killed)
        with pytest.raises(KeyboardInterrupt):
            train(run, images, tmp_path / 'killed', save_every=0)
    resumed, resumed_state = train(run, images, tmp_path / 'killed')
    assert resumed_state['losses'] == state['losses'] and len(state['losses']) == 8
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize('method', METHODS)
def test_plain_and_mte_differ_in_mte_alone(method, monkeypatch, tmp_path):
    seen = {}
    for options in (None, OPTIONS):
        run, images = short(method, options, seed=3), few()
        start = {k: v.clone() for k, v in make_method(run, images).backbone.state_dict().items()}
        batches = []

        def recorded(self, views, labels, epoch, batches=batches, forward=METHODS[method].forward):
            batches.append(([v.clone() for v in views], labels))
            return forward(self, views, labels, epoch)

        with monkeypatch.context() as patch:
            patch.setattr(METHODS[method], 'forward', recorded)
            trained, state = train(run, images, tmp_path)
        assert all(map(math.isfinite, state['losses']))
        assert any(isinstance(m, mte.MTE) for m in trained.student.modules()) == (options is not None)
        assert any(not torch.equal(v, start[k]) for k, v in trained.backbone.named_parameters())
        groups = make_optimizer(run, trained).param_groups
        seen[options is None] = start, batches, {(g['lr'], g['lr_scale'], g['weight_decay']) for g in groups}
    (plain, _, of_plain), (ours, _, of_ours) = seen[True], seen[False]
    names = [k for k in plain if not k.startswith('head.')]  # a classifier is drawn after the backbone
    assert all(torch.equal(plain[k], ours[k]) for k in names) and plain.keys() == ours.keys()
    assert of_plain == of_ours
    for (views, labels), (others, same) in zip(seen[True][1], seen[False][1], strict=True):
        assert torch.equal(labels, same) and all(map(torch.equal, views, others))


def test_heterogeneous_token_is_one_more_of_the_ensemble():
    method = METHODS['hssl'](make_backbone(short('hssl'), few()), OPTIONS).eval()
    student, views = method.student, [torch.randn(3, 1, 28, 28), torch.randn(3, 1, 16, 16)]
    with torch.no_grad():
        out, found = student(views), []
        for x in views:
            whole = student.network(x)
            tokens = torch.cat([whole.tokens.aux_cls, whole.tokens.pooled], dim=1)
            projections = [
                F.normalize(h.layers(t), dim=-1) for h, t in zip(student.network.aux.heads, tokens.unbind(1))
            ]
            maps = whole.tokens.patches.mT.unflatten(2, whole.tokens.grid)
            token = student.head[0](student.blocks[:-2](maps).mean(dim=(2, 3)))
            projections.append(F.normalize(student.head[1].layers(token), dim=-1))
            found.append(student.network.aux.global_head.last_layer(torch.stack(projections).mean(dim=0)))
    torch.testing.assert_close(out.aux, torch.cat(found))
    assert any(p is student.head[1].last_layer.weight_v for p in student.network.aux.global_head.parameters())


def test_heterogeneous_head_teaches_alone_without_mte():
    method = METHODS['hssl'](make_backbone(short('hssl'), few()), None)
    views = [torch.randn(4, 1, 28, 28) for _ in range(2)] + [torch.randn(4, 1, 16, 16) for _ in range(4)]
    loss = method(views, torch.zeros(4), 1)
    loss.backward()
    heads = method.student.network.heads[0], method.student.head[1]
    assert all(p.grad is not None for h in heads for p in h.layers.parameters())
    assert isinstance(method.criterion, mte.MTELoss) and not isinstance(method.evaluated, mte.MTE)


def test_heads_alone_stand_on_the_class_token():
    run = short(options={'n_cls': 3, 'n_pool': 0, 'ten': False})
    method = METHODS['moco_v3'](make_backbone(run, few()), run.mte, cls_init='class').eval()
    for network in (method.student, method.teacher):
        tokens = network(torch.randn(2, 1, 28, 28)).tokens
        assert torch.equal(tokens.aux_cls, tokens.global_token[:, None].expand(-1, 3, -1))


def test_attention_of_ten_starts_at_xaviers_scale():
    torch.manual_seed(0)
    method = METHODS['moco_v3'](make_backbone(short(), few()), OPTIONS, ten_scale='xavier')
    ten = method.student.aux.ten
    keys, values = ten.kv.weight.chunk(2)
    for weight in (ten.q.weight, keys):
        assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.05)
    assert values.std().item() == pytest.approx(0.02, rel=0.05)


def test_attention_that_is_not_cut_reaches_own_tokens():
    x, features = torch.randn(2, 1, 28, 28), {}
    for masks in (True, False):
        method = METHODS['dino'](make_backbone(short('dino'), few()), OPTIONS, mask_attention=masks).eval()
        with torch.no_grad():
            plain = method.backbone(x)
            tokens = method.student(x).tokens
            assert torch.equal(plain, tokens.global_token) == masks
            method.student.aux.cls_tokens.mul_(5)
            assert torch.equal(method.student(x).tokens.global_token, tokens.global_token) == masks
        features[masks] = plain
    assert torch.equal(*features.values())


def test_without_distillation_the_global_token_has_a_loss_of_its_own():
    method = METHODS['byol'](make_backbone(short('byol'), few()), OPTIONS, distill=False)
    out, target = (mte.MTEOutput(torch.randn(4, 8), torch.randn(4, 8), None) for _ in range(2))
    own = [-F.cosine_similarity(a, b).mean() for a, b in ((out.output, target.output), (out.aux, target.aux))]
    torch.testing.assert_close(method.criterion(out, target), sum(own) / 2)
    targets = method.targets([torch.randn(4, 1, 28, 28)])
    assert not torch.equal(targets.output, targets.aux)


def test_random_tokens_are_the_same_for_all_networks(monkeypatch):
    images, wraps, inner = few(128, 64), [], mte.wrap
    monkeypatch.setattr(mte, 'wrap', lambda backbone: wraps.append(inner(backbone)) or wraps[-1])
    found = [random_token_accuracies(make_backbone(short(seed=seed), images), images) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert list(found[0]['knn of tokens']) == [f'cls {i + 1}' for i in range(4)] + [f'pooled {i + 1}' for i in range(6)]
    first, _, second = (w.state_dict() for w in wraps)
    own = [k for k in first if not k.startswith('backbone.')]
    assert own and all(torch.equal(first[k], second[k]) for k in own)
    assert not torch.equal(first['backbone.cls_token'], second['backbone.cls_token'])


def test_concatenation_is_two_networks_side_by_side():
    images = few(128, 64)
    networks = [METHODS['dino'](make_backbone(short(seed=s), images), None).evaluated for s in range(2)]
    each = [[features(n.backbone, images, which) for which in ('train', 'test')] for n in networks]
    splits = [(torch.cat([F.normalize(x, dim=1) for x, _ in split], dim=1), split[0][1]) for split in zip(*each)]
    assert concatenated(networks, images) == side_by_side(*each) == analysis.knn_accuracy(*splits)
    assert concatenated(networks[:1], images) == knn(networks[0], images)


@pytest.mark.parametrize('size', [24, 64])  # smaller and larger than the crops
def test_each_image_of_a_batch_gets_its_own_crop_as_torchvision_makes_it(size):
    images, boxes = torch.randint(0, 256, (8, 3, 56, 48), dtype=torch.uint8), random_boxes(8, 56, 48, (0.2, 0.9))
    rows, columns = resizing(boxes[:, 0], boxes[:, 2], 56, size), resizing(boxes[:, 1], boxes[:, 3], 48, size)
    ours = resized_crops(images, rows, columns)
    slow = [resized_crop(x.float(), *b, [size, size], antialias=True) for x, b in zip(images, boxes.int().tolist())]
    torch.testing.assert_close(ours, torch.stack(slow), rtol=1e-4, atol=1e-3)
    assert len({tuple(b) for b in boxes.tolist()}) == 8
    rough = resized_crops(images, rows, columns, torch.bfloat16)
    assert (rough - ours).abs().max() < 3  # of 255


def test_boxes_are_distributed_as_those_of_random_resized_crop():
    ours = random_boxes(4000, 56, 48, (0.3, 1.0))
    image = torch.empty(3, 56, 48)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= 56).all() and (ours[:, 1] + ours[:, 3] <= 48).all()
    error = theirs.float().std(dim=0) * (2 / 4000) ** 0.5
    assert ((ours.mean(dim=0) - theirs.float().mean(dim=0)).abs() < 4 * error).all()


def test_colors_are_those_of_torchvision_but_for_hue():
    x = torch.rand(2, 3, 9, 9) / 4 + 0.3
    mix, contrast = coloring(2, 3, 0.0, 1.0)
    torch.testing.assert_close((mix @ x.flatten(2)), adjust_saturation(x, 0.0).flatten(2), rtol=0, atol=1e-3)
    mix, contrast = coloring(500, 3, 0.4, 0.0)
    gray = torch.full((3, 1), 0.5)
    assert (luma(mix @ gray)[:, 0, 0] - (mix @ gray)[:, 1, 0]).abs().max() < 1e-2  # gray stays gray
    assert (mix @ gray).min() > 0.29 and (mix @ gray).max() < 0.71 and 0.59 < contrast.min() < contrast.max() < 1.41
    assert 0.1 < (contrast == 1).float().mean() < 0.3


def test_blur_is_a_gaussian_for_each_image_and_leaves_others_as_they_are():
    kernels = blurring(torch.tensor([0.0, 1.5]), 41)
    assert torch.equal(kernels[0], torch.eye(41))
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    torch.testing.assert_close((kernels[1] @ point @ kernels[1].mT), gaussian_blur(point, [41, 41], [1.5, 1.5]))


def test_views_of_a_batch_are_normalized_and_drawn_by_the_seed():
    pixels = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8)
    view = View(32, (0.3, 1.0), blur=0.5, solarize=0.5)
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(make_view(pixels, view, (0.5,) * 3, (0.25,) * 3))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert views[0].shape == (16, 3, 32, 32) and views[0].abs().max() <= 2


def test_pictures_are_decoded_once_and_held_out_images_are_of_the_training_split(tmp_path, monkeypatch):
    for which, count in (('train', 12), ('val', 4)):
        for i in range(count):
            path = tmp_path / 'photos' / which / f'class{i % 2}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (50 + i, 40), (10 * i, 0, 0)).save(path)
    images = open_images(str(tmp_path / 'photos'), 36, (None, None), cache=tmp_path / 'cache')
    pixels, labels = images.pixels('train', images.train_side)
    assert pixels.shape == (12, 3, 42, 42) and sorted(labels.tolist()) == [0] * 6 + [1] * 6
    assert images.identity()['source'] == 'folder' and str(tmp_path) not in str(images.identity())
    ours = open_images(str(tmp_path / 'photos'), 36, (None, None), True, tmp_path / 'cache')
    parts = [ours.pixels(which, 36)[0][:, 0, 0, 0].tolist() for which in ('train', 'test')]
    assert sorted(parts[0] + parts[1]) == [10 * i for i in range(12)] and len(parts[1]) == 2
    monkeypatch.setattr(data.datasets.folder, 'default_loader', None)
    data._decoded.cache_clear()
    assert torch.equal(images.pixels('train', 42)[0], pixels)
    run = Run('moco_v3', None, batch_size=4)
    feed = Feed(run, images, make_method(run, images), 'cpu')
    seen = torch.cat([labels for _, labels in feed.epoch(0)])
    assert len(seen) == 12 and sorted(seen.tolist()) == sorted(labels.tolist())


def test_several_studies_share_the_runs(tmp_path):
    with study.claimed(tmp_path / 'run.lock') as ours, study.claimed(tmp_path / 'run.lock') as others:
        assert ours and not others
    with study.claimed(tmp_path / 'run.lock') as again:
        assert again


def test_costs_are_of_steps_side_by_side(tmp_path):
    study.main(['--smoke', '--costs', '--method', 'byol', '--output', str(tmp_path)])
    found = records.read(tmp_path / 'fashion-mnist-sample.jsonl')['costs']['methods']
    assert found['byol']['plain']['ratios'] == [1, 1, 1]
    assert found['byol']['mte']['parameters'] > found['byol']['plain']['parameters']
    assert found['byol']['mte']['operations'] > found['byol']['plain']['operations'] > 0


def test_unknown_settings_data_and_models_are_named(tmp_path, capsys):
    with pytest.raises(ValueError, match='prototypes'):
        METHODS['dino'](make_backbone(short(), few()), None, protoypes=3)
    with pytest.raises(ValueError, match='torchvision'):
        open_images('torchvision:NoSuch:folder', None, (None, None))
    with pytest.raises(SystemExit):
        study.main(['--smoke', '--model', 'resnet18', '--method', 'ibot', '--output', str(tmp_path)])
    assert 'resnet18 has no patch tokens, which ibot needs' in capsys.readouterr().err
    with pytest.raises(ValueError, match='no folder train'):
        open_images(str(tmp_path), None, (None, None)).split('train')


def test_patch_accuracies_are_their_definition():
    images = few(128, 64)
    backbone = make_backbone(short(), images).eval()
    found, inputs, means, highest = patch_accuracies(backbone, images, (1, 7)), [], [], []
    for which in ('train', 'test'):
        x, labels = (torch.cat(parts) for parts in zip(*images.loader(which)))
        handle = backbone.blocks[-1].norm1.register_forward_hook(lambda m, i, out: inputs.append(out))
        with torch.no_grad():
            patches = backbone.forward_features(x)[:, 1:]
            attention = class_attention(backbone.blocks[-1].attn, inputs[-1])[:, 1:]
        handle.remove()
        rows = []  # the mean of the patches with the most attention, image by image
        for own, weights in zip(patches, attention):
            picked = sorted(range(len(weights)), key=lambda i, weights=weights: -weights[i])[:7]
            rows.append(sum(own[i] for i in picked) / 7)
        means.append((patches.mean(dim=1), labels))
        highest.append((torch.stack(rows), labels))
    assert found.keys() == {'top 1', 'top 7', 'top 49', 'all'}
    assert found['all'] == found['top 49'] == pytest.approx(analysis.knn_accuracy(*means))
    assert found['top 7'] == pytest.approx(analysis.knn_accuracy(*highest), abs=1.6)  # one image of 64


def test_class_attention_is_the_attention():
    backbone = make_backbone(short(), few()).eval()
    attn, x = backbone.blocks[0].attn, torch.randn(2, 10, 96)
    b, n, h = 2, 10, attn.num_heads
    q, k, _ = (t.reshape(b, n, h, -1) for t in attn.qkv(x).chunk(3, dim=-1))
    rows = [F.softmax(q[i, 0, j] @ k[i, :, j].T * 32**-0.5, dim=0) for i in range(b) for j in range(h)]
    torch.testing.assert_close(class_attention(attn, x), torch.stack(rows).view(b, h, n).mean(dim=1))


def test_fine_tuning_learns_and_trains_a_frozen_teacher_through(monkeypatch):
    images, seen, inner = few(256, 128), [], torch.optim.AdamW
    backbone = METHODS['dino'](make_backbone(short(), images), None).evaluated.backbone
    assert not any(p.requires_grad for p in backbone.parameters())
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    monkeypatch.setattr(torch.optim, 'AdamW', lambda groups, **kwargs: seen.extend(groups) or inner(groups, **kwargs))
    assert fine_tuned(backbone, images, epochs=4, lr=2e-3) > 2 * 10  # twice what chance gives
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert len({id(p) for g in seen for p in g['params']}) == len(list(backbone.parameters())) + 2
    assert len({g['lr_scale'] for g in seen}) == 6  # embedding, four blocks, classifier


def test_differences_and_verdicts():
    diff = difference({0: 3.0, 1: 4.0, 2: 5.0, 9: 0.0}, {0: 1.0, 1: 2.5, 2: 2.5})
    assert diff.mean == pytest.approx(2.0) and diff.seeds == 3
    assert diff.half_width == pytest.approx(4.302653 * 0.5 / math.sqrt(3), rel=1e-5)
    assert diff.verdict(1) == 'confirmed' and diff.verdict(-1) == 'contradicted'
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert diff.verdict(0) == 'contradicted' and str(diff) == '+2.0 ± 1.2'
    one = difference({0: 1.0}, {0: 2.0})
    assert 'one seed' in one.verdict(1) and str(one) == '-1.0'
    wide = difference({0: 1.0, 1: 3.5, 2: 2.25}, {0: 2.0, 1: 2.0, 2: 2.0})
    assert (wide.verdict(1), wide.verdict(-1)) == ('undecided, leaning for', 'undecided, leaning against')
    assert wide.verdict(0) == 'undecided'  # too wide to say that there is none
    narrow = difference({0: 1.1, 1: 1.0, 2: 0.9}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert narrow.verdict(0) == 'confirmed'
    assert difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}).verdict(1) == 'two seeds'  # which agree by chance


def test_the_report_of_photographs_opens_with_the_gain_and_its_time(tmp_path):
    images = {'name': 'photos', 'size': 96, 'limits': [None, None], 'mean': [0.5] * 3, 'std': [0.5] * 3}
    path = tmp_path / 'photos.jsonl'
    untrained = {'untrained': {'photo_vit': [20.0, 20.0]}, 'raw pixels': None, 'random tokens': []}
    records.put(path, 'references', untrained)
    for seed, (variant, k) in itertools.product((0, 1), (('plain', 40.0), ('mte', 46.0), ('plain-equal-time', 42.0))):
        run = Run('moco_v3', OPTIONS if variant == 'mte' else None, seed, 4, 'photo_vit', variant=variant)
        cka = [[1.0, 0.9, 0.2], [0.9, 1.0, 0.3], [0.2, 0.3, 1.0]]
        tokens = {'tokens': {'cls 1': k + 1, 'pooled 1': k + 2}, 'cka': cka} if variant == 'mte' else {}
        watched = [{'epoch': e, 'seconds': e, 'knn': k - 4 + e + seed, **tokens} for e in (2, 4)]
        accuracy = {'knn': k + seed * (1 + (variant == 'mte')), 'linear': k}
        content = {'run': run._asdict(), 'images': images, 'settings': {}, 'steps': 8, 'made by': {'commit': 'abc'}}
        records.put(path, run.name, {**content, 'watched': watched, 'accuracy': accuracy})
    forms = {
        v: {'seconds': s, 'parameters': 1, 'operations': 1, 'ratios': [1, 1, 1]} for v, s in (('plain', 1), ('mte', 2))
    }
    records.put(path, 'costs', {'methods': {'moco_v3': forms}})
    text = report(path, tmp_path / 'photos', 'photos/')
    opening = text[: text.index('| | claim |')]
    assert '| MoCo v3 | k-NN | equal epochs | 40.5 | 47.0 | +6.5 ± 6.4 | 2 | +6.5 ± 6.4 |' in opening
    assert '| MoCo v3 | k-NN | equal time | 42.5 | 47.0 | +4.5 ± 6.4 | 2 | +4.5 ± 6.4 |' in opening
    assert 'photos/time.png' in opening and (tmp_path / 'photos' / 'time.png').exists()
    assert '| mte | 0 | 4 of 4 |  | 0.90 to 0.90 | 46.0 | 47.0 to 47.0 | 48.0 to 48.0 |' in text


def test_rows_compare_what_the_claim_is_about():
    tab3 = next(e for e in EXPERIMENTS if e.name == 'Tab. 3')
    found = {}
    for variant, k, patches in (('plain', 60, (50, 51, 52)), ('mte', 65, (51, 52.1, 53))):  # the class token gains more
        results = ({'knn': k + seed, 'patches': {'all': patches[seed]}} for seed in (0, 1, 2))
        found['ibot', variant] = {seed: {'accuracy': accuracy} for seed, accuracy in enumerate(results)}
    rows = {r.metric: r for r in rows_of(tab3, found)}
    assert rows['patches/all - knn'].difference.mean == pytest.approx(-3.9667, abs=1e-4)
    assert rows['patches/all - knn'].verdict == 'contradicted' and rows['patches/all - knn'].paper == 4.9
    assert rows['knn'].verdict == rows['patches/all'].verdict == ''  # the claim is about neither alone
    assert in_words(tab3, list(rows.values())) == '**iBOT**: k-NN, patches minus class token contradicted'
    tried = next(e for e in EXPERIMENTS if e.exploratory)
    found = {}
    for variant, k in (('plain', 60), ('mte-weight-3', 65)):
        found['supervised', variant] = {seed: {'accuracy': {'knn': k + seed / (k - 58)}} for seed in (0, 1)}
    assert [r.verdict for r in rows_of(tried, found)] == ['']


@pytest.mark.parametrize(
    'plan', [PLAN, photographs.PLAN, photographs.SMALL, vit_s.PLAN], ids=['gray', 'photographs', 'small', 'vit-s']
)
def test_experiments_have_their_reference_and_names_of_their_own(plan):
    for experiment in plan.experiments:
        variants = {(v.method, v.name) for v in experiment.variants}
        assert set(experiment.decides) <= set(experiment.expected)
        for method, ours, reference, _, _ in experiment.comparisons:
            assert {(method, ours), (method, reference)} <= variants and ours != reference
    runs = {run.name: run for e in plan.experiments for run in runs_of(e, plan)}
    for run in (r for e in plan.experiments for r in runs_of(e, plan)):
        assert runs[run.name] == run and ' ' not in run.name  # the same line for the same run only


def test_smoke(tmp_path):
    args = ['--smoke', '--output', str(tmp_path)]
    study.main(args)
    path, pictures = tmp_path / 'fashion-mnist-sample.jsonl', tmp_path / 'fashion-mnist-sample'
    runs = {r.name for e in EXPERIMENTS for r in runs_of(e._replace(seeds=1), PLAN)}
    pairs = {r.name for e in EXPERIMENTS if e.name == 'Tab. 5' for r in runs_of(e._replace(seeds=2), PLAN)}
    lines = records.read(path)
    assert lines.keys() == runs | pairs | {'references', 'costs', 'side-by-side'}
    lossless = lines['dino-mte-seed0']['accuracy']
    assert lossless['knn'] == lossless['knn with tokens'] and lossless[SAME] is True  # to the last digit, and bit
    assert lines['dino-attention-not-masked-short-seed0']['accuracy'][SAME] is False
    assert lines['dino-mte-seed0']['watched'][0]['tokens'].keys() == lossless['knn of tokens'].keys()
    assert str(tmp_path) not in path.read_text() and str(Path.home()) not in path.read_text()
    text = (tmp_path / 'REPORT.md').read_text()
    assert all(e.claim in text for e in EXPERIMENTS) and 'not run' not in text.lower()
    assert all((tmp_path / link).exists() for link in re.findall(r'!\[.*?\]\((.*?)\)', text))
    drawn = {p.name for p in pictures.glob('*.png')}
    assert (
        drawn == set(re.findall(r'/([a-z]+\.png)', text)) and len(drawn) == 9 and 'time.png' in drawn
    )  # time to accuracy is the ninth
    study.main(args)  # finished already
    assert {n: v for n, v in records.read(path).items() if 'run' in v} == {n: v for n, v in lines.items() if 'run' in v}
    with pytest.raises(SystemExit, match='other settings'):
        study.main([*args, '--epochs', '2'])
    network = tmp_path / 'checkpoints' / path.stem / 'dino-mte-seed0.network.pt'
    saved = torch.load(network, weights_only=True)
    torch.save({**saved, 'identity': 'another'}, network)  # as a study of other settings leaves it
    (pictures / 'kernels.png').unlink()
    path.write_text(''.join(f'{json.dumps(v)}\n' for n, v in lines.items() if n != 'side-by-side'))
    study.main([*args, '--only', 'Tab. 5', '--method', 'dino'])
    networks = records.read(path)['side-by-side']['networks']
    assert networks['dino, plain']['pairs'] and 'dino, mte' not in networks
    assert (pictures / 'kernels.png').exists()  # of the other seed


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run, images = short('byol'), few()
    train(run, images, tmp_path)
    for other, seen in ((run._replace(lr=0.1), images), (run, few(48))):
        with pytest.raises(SystemExit, match='other settings'):
            train(other, seen, tmp_path)


def test_steps_are_in_bfloat16_and_losses_in_float32(tmp_path, monkeypatch):
    seen, losses, images = [], {}, few()
    inner = METHODS['moco_v3'].loss

    def loss(self, student, teacher):
        seen.append((student.output.dtype, inner(self, student, teacher).dtype))
        return inner(self, student, teacher)

    monkeypatch.setattr(METHODS['moco_v3'], 'loss', loss)
    for precision in ('bfloat16', 'float32'):
        run = short(precision=precision)
        method, state = train(run, images, tmp_path / precision)
        losses[precision] = torch.tensor(state['losses'])
        assert all(block.attn.fused_attn for block in method.backbone.blocks)  # as it was
    assert set(seen[:8]) == {(torch.bfloat16, torch.float32)} and set(seen[8:]) == {(torch.float32, torch.float32)}
    error = (losses['bfloat16'] - losses['float32'])[0].abs()  # of the same weights
    assert 0 < error < 0.02


def test_a_study_that_has_few_minutes_goes_on_with_the_same_command(tmp_path):
    command = ['--limit', '256', '32', '--only', 'Tab. 5', '--method', 'moco_v3', '--variant', 'plain', '--seeds', '1']
    command += ['--epochs', '1', '--device', 'cpu', '--output', str(tmp_path), '--checkpoints', str(tmp_path / 'c')]
    for step in (1, 2):
        with pytest.raises(SystemExit, match=f'stopped at step {step} of 4'):
            study.main([*command, '--minutes', '1e-9'])
    study.main(command)
    assert records.read(tmp_path / 'fashion-mnist-sample.jsonl')['moco_v3-plain-seed0']['steps'] == 4


def test_what_is_watched_comes_with_its_epoch(tmp_path):
    run, images, calls = short('byol'), few(), []

    def watch(method, epoch):
        calls.append(epoch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {'calls': len(calls)}

    with pytest.raises(KeyboardInterrupt):
        train(run, images, tmp_path, save_every=0, watch=watch)
    _, state = train(run, images, tmp_path, watch=watch)
    assert [w['calls'] for w in state['watched']] == [1, 3] and state['step'] == 8 == len(state['losses'])


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', 'swin_tiny_patch4_window7_224', 'vit_tiny_patch16_224'])
def test_models_of_timm_get_the_options_that_fit(name):
    images = open_images('sample', 32 if name != 'swin_tiny_patch4_window7_224' else 224, (8, 8))
    run = study.fitting(Run('byol', {'n_cls': 4, 'n_pool': 0}, model=name), images)
    assert run.mte == ({'n_cls': 4, 'n_pool': 0} if name.startswith('vit') else {'n_cls': 0, 'n_pool': 6})
    METHODS['byol'](make_backbone(run, images), run.mte)


@pytest.mark.parametrize('size', [28, 32, 224])
def test_small_models_and_local_views_fit_the_images(size):
    images = open_images('sample', size, (4, 4))
    for model in ('vit', 'swin'):
        make_backbone(Run('byol', None, model=model), images)
    method = METHODS['dino'](make_backbone(short(), images), None)
    pixels, _ = images.pixels('train', images.train_side)
    views = [make_view(pixels[:2], view, images.mean, images.std) for view in method.views(size)]
    assert method.student(views).shape[0] == 2 * len(views)


@pytest.mark.slow
def test_processes_train_together(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29653']
    rest = ['-m', 'benchmarks.study', '--device', 'cpu', '--limit', '128', '64', '--epochs', '1', '--seeds', '1']
    rest += ['--only', 'Tab. 8', 'Tab. 3', '--output', str(tmp_path), '--checkpoints', str(tmp_path / 'checkpoints')]
    subprocess.run(
        command + rest, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, cwd=Path(study.__file__).parents[2]
    )
    results = [r for r in records.read(tmp_path / 'fashion-mnist-sample.jsonl').values() if 'run' in r]
    assert len(results) == 6
    assert all(r['steps'] == 128 // (2 * r['run']['batch_size']) for r in results)
