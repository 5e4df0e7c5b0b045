"""The demo and the generated table."""

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from benchmarks import common, demo, sweep, tables
from benchmarks.speed import parts, scaling, timing
from benchmarks.speed.steps import STEPS, Row, make_step

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    'name',
    ('README.md', 'benchmarks/README.md', *(str(p.relative_to(ROOT)) for p in sorted((ROOT / 'docs').glob('**/*.md')))),
)
def test_tables_are_the_results(name):
    text = (ROOT / name).read_text()
    assert tables.with_tables(text) == text
    with pytest.raises(ValueError, match='no table is named nothing'):
        tables.with_tables('<!-- nothing: made by benchmarks/tables.py -->')


@pytest.mark.parametrize('method', sorted(STEPS))
@pytest.mark.parametrize('name', ('demo ViT', 'Swin-T'))
def test_forms_of_a_step_compute_the_same(name, method):
    swin = dict(img_size=64, window_size=2, depths=(1, 1, 1, 1), embed_dim=12)
    size, small = (28, {'depth': 1}) if name == 'demo ViT' else (64, swin)
    views = (size,) * (1 if method == 'supervised' else 2)
    row = Row(name, method, 2, views, 16, model_kwargs=tuple(small.items()))
    steps = {v: make_step(row, v) for v in ('plain', 'mte', 'naive')}
    views = steps['mte'].views
    losses = {}
    for variant, step in steps.items():
        step.views = views
        torch.manual_seed(0)  # for stochastic depth and masks
        losses[variant] = step.loss()
    torch.testing.assert_close(losses['naive'], losses['mte'], rtol=1e-3, atol=1e-3)
    assert losses['plain'].isfinite() and steps['mte'].operations() > steps['plain'].operations() > 0
    for step in steps.values():
        step()


def test_sweep_covers_every_architecture_of_its_timm_and_held_a_small_one_of_each_class_to_plain():
    models = sweep.read()
    counts = Counter(m['group'] for m in models)
    assert counts['failed'] == 0 and counts['cls+pool'] >= 270 and counts['pool'] >= 1000
    assert len(models) == len({m['name'] for m in models}) >= 1371
    assert all(m['reason'] for m in models if m['group'] == 'refused')
    checked = [m for m in models if m['checked']]
    smallest = {m['class']: m['params_m'] for m in sweep.smallest_of_each_class(models)}
    assert {m['class']: m['params_m'] for m in checked} == smallest
    assert all(m['checked'] == 'same as plain' for m in checked)
    assert len(checked) >= 79


@pytest.mark.parametrize(
    ('name', 'group'), [('test_vit', 'cls+pool'), ('test_resnet', 'pool'), ('crossvit_tiny_240', 'refused')]
)
def test_sweep_groups(name, group):
    assert sweep.sweep_one(name)['group'] == group


def test_knn_is_weighted_cosine_knn():
    x, q = torch.randn(300, 8), torch.randn(50, 8)
    y = torch.randint(4, (300,))
    truth = torch.randint(4, (50,))
    knn = KNeighborsClassifier(10, metric='cosine', weights=lambda d: np.exp((1 - d) / 0.07)).fit(x, y)
    assert demo.knn_accuracy((x, y), (q, truth)) == pytest.approx(100 * knn.score(q, truth))


def test_info_nce_pulls_the_other_view():
    views = torch.eye(4).repeat(2, 1)
    assert common.info_nce(views, views) < common.info_nce(views, views.roll(1, 0))


@pytest.mark.parametrize('model', ['test_vit', 'test_convnext'])
def test_demo_on_a_folder_of_images(model, tmp_path):
    zoo.needs_local_dir()
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{i}.png')
    options = ['--data', tmp_path, '--model', model, '--img-size', '64', '--epochs', '1', '--batch-size', '8']
    options += ['--n-cls', '2' if model == 'test_vit' else '0', '--n-pool', '2', '-o', tmp_path / 'out']
    command = [sys.executable, '-m', 'benchmarks.demo', *map(str, options)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert 'bit for bit' in run.stdout and 'MTE, 1 epochs' in run.stdout
    out = {p.name for p in (tmp_path / 'out').iterdir()}
    assert out == {'accuracy.png', 'export', 'pooling.png', 'result.json'}


def test_parts_and_scaling_run(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, 'LEAST_SECONDS', 0)
    args = argparse.Namespace(device='cpu', dtype=None, rounds=2, compile=False)
    row = Row('demo ViT', 'demo', 2, (28, 28), model_kwargs=(('depth', 1),))
    shares = parts.measure_parts(row, args)
    assert list(shares) == ['observers in the blocks', 'TEN', 'pooling', 'heads', 'loss']
    rows = [
        {'axis': 'depth', 'value': d, 'operations_ratio': 1.1, 'ratio': 1.2, 'low': 1.1, 'high': 1.3} for d in (1, 2)
    ]
    rows += [{**r, 'axis': 'n_cls'} for r in rows]
    scaling.draw_scaling(rows, tmp_path / 'scaling.png')
    assert Image.open(tmp_path / 'scaling.png').size[0] > 600
    assert 'depth' in tables.scaling({'scaling': rows}) and 'TEN' in tables.parts({'parts': {'demo': shares}})
