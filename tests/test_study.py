"""The study: runs that can be killed, fair pairs, evaluation held to its definition, and the whole path."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import mte_timm as mte
from benchmarks.study import __main__ as study
from benchmarks.study.data import open_images
from benchmarks.study.evaluate import class_attention, fine_tuned, patch_accuracies
from benchmarks.study.methods import METHODS
from benchmarks.study.plan import EXPERIMENTS, runs_of
from benchmarks.study.report import difference, report
from benchmarks.study.train import Run, make_backbone, train
from mte_timm import analysis

OPTIONS = {'n_cls': 1, 'n_pool': 1}


def few(train=64, test=32):
    return open_images('sample', None, (train, test))


def short(method='moco_v3', options=OPTIONS, **kwargs):
    model = 'swin' if method == 'moby' else 'vit'
    options = {**options, 'n_cls': 0} if options and model == 'swin' else options
    return Run(method, options, epochs=2, batch_size=16, model=model, **kwargs)


@pytest.mark.parametrize('options', [None, OPTIONS], ids=['plain', 'mte'])
@pytest.mark.parametrize('method', ['dino', 'ibot', 'moby'])
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
        start = make_backbone(run, images)
        batches = []

        def recorded(self, views, labels, epoch, batches=batches, forward=METHODS[method].forward):
            batches.append(([v.clone() for v in views], labels))
            return forward(self, views, labels, epoch)

        with monkeypatch.context() as patch:
            patch.setattr(METHODS[method], 'forward', recorded)
            trained, state = train(run, images, tmp_path)
        assert all(map(math.isfinite, state['losses'])) and isinstance(trained.student, mte.MTE) == (
            options is not None
        )
        assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), trained.backbone.parameters()))
        seen[options is None] = start.state_dict(), batches
    for a, b in zip(*(s[0].values() for s in seen.values())):
        assert torch.equal(a, b)
    for (views, labels), (others, same) in zip(*(s[1] for s in seen.values()), strict=True):
        assert torch.equal(labels, same) and all(map(torch.equal, views, others))


def test_unknown_settings_and_data_are_named(tmp_path):
    with pytest.raises(ValueError, match='prototypes'):
        METHODS['dino'](make_backbone(short(), few()), None, protoypes=3)
    with pytest.raises(ValueError, match='torchvision'):
        open_images('torchvision:NoSuch:folder', None, (None, None))
    with pytest.raises(ValueError, match='no folder train'):
        open_images(str(tmp_path), None, (None, None)).split('train', None)


def test_patch_accuracies_are_their_definition():
    images = few(128, 64)
    backbone = make_backbone(short(), images).eval()
    found = patch_accuracies(backbone, images, (1, 7))
    means = []
    for which in ('train', 'test'):
        pairs = list(images.loader(which))
        with torch.no_grad():
            x = torch.cat([backbone.forward_features(x)[:, 1:].mean(dim=1) for x, _ in pairs])
        means.append((x, torch.cat([y for _, y in pairs])))
    assert found['all'] == pytest.approx(analysis.knn_accuracy(*means)) and found['top 49'] == found['all']
    assert found.keys() == {'top 1', 'top 7', 'top 49', 'all'}


def test_class_attention_is_the_attention():
    backbone = make_backbone(short(), few()).eval()
    attn, x = backbone.blocks[0].attn, torch.randn(2, 10, 96)
    b, n, h = 2, 10, attn.num_heads
    q, k, _ = (t.reshape(b, n, h, -1) for t in attn.qkv(x).chunk(3, dim=-1))
    rows = [F.softmax(q[i, 0, j] @ k[i, :, j].T * 32**-0.5, dim=0) for i in range(b) for j in range(h)]
    torch.testing.assert_close(class_attention(attn, x), torch.stack(rows).view(b, h, n).mean(dim=1))


def test_fine_tuning_learns():
    images = few(256, 128)
    backbone = make_backbone(short(), images)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    chance = 100 / 10
    assert fine_tuned(backbone, images, epochs=6, lr=2e-3) > 2 * chance
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_differences_and_verdicts():
    diff = difference({0: 3.0, 1: 4.0, 2: 5.0, 9: 0.0}, {0: 1.0, 1: 2.5, 2: 2.5})
    assert diff.mean == pytest.approx(2.0) and diff.seeds == 3
    assert diff.half_width == pytest.approx(4.302653 * 0.5 / math.sqrt(3), rel=1e-5)
    assert diff.verdict(1) == 'confirmed' and diff.verdict(-1) == 'contradicted'
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert 'one seed' in difference({0: 1.0}, {0: 2.0}).verdict(1)
    assert 'undecided' in difference({0: 1.0, 1: 3.0}, {0: 2.0, 1: 2.0}).verdict(1)


def test_experiments_have_their_reference_and_names_of_their_own():
    for experiment in EXPERIMENTS:
        methods = {method for method, *_ in experiment.runs}
        assert {(m, experiment.reference) for m in methods} <= {(m, v) for m, v, _ in experiment.runs}
    runs = {run.name: run for e in EXPERIMENTS for run in runs_of(e)}
    for run in (r for e in EXPERIMENTS for r in runs_of(e)):
        assert runs[run.name] == run  # the same file for the same run only


def test_smoke(tmp_path):
    args = ['--smoke', '--output', str(tmp_path), '--checkpoints', str(tmp_path / 'checkpoints')]
    study.main(args)
    folder = tmp_path / 'fashion-mnist-sample'
    runs = {r.name for e in EXPERIMENTS for r in runs_of(e._replace(seeds=1))}
    assert {p.stem for p in folder.glob('*-seed*.json')} == runs
    lossless = json.loads((folder / 'dino-mte-seed0.json').read_text())['accuracy']
    assert lossless['knn'] == lossless['knn with tokens']  # to the last digit
    text = report(folder)
    assert all(e.claim in text for e in EXPERIMENTS) and 'Not run' not in text
    before = {p: p.stat().st_mtime_ns for p in folder.glob('*.json')}
    study.main(args)  # finished already
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob('*.json')}
    with pytest.raises(SystemExit, match='other settings'):
        study.main([*args, '--epochs', '2'])
