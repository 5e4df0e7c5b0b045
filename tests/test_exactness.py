"""Outputs, tokens and gradients equal those of a slow form that shares only the parameters, in float64."""

import pytest
import torch
import zoo
from slow_form import pooled, slow_forward

import mte_timm as mte
from mte_timm.tokens import AdaptivePooling


def assert_same(wrapped, x, grid=None):
    fast = wrapped(x)
    fast_parts = (fast.output, fast.aux, fast.tokens.aux_cls, fast.tokens.pooled)
    slow_parts = slow_forward(wrapped, x, grid)
    for a, b in zip(fast_parts, slow_parts):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    weights = [torch.randn_like(p) for p in fast_parts]
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(sum((p * w).sum() for p, w in zip(parts, weights)), parameters, allow_unused=True)
        for parts in (fast_parts, slow_parts)
    ]
    for (name, _), a, b in zip(((n, p) for n, p in wrapped.named_parameters() if p.requires_grad), *grads):
        assert (a is None) == (b is None), name
        if a is not None:
            scale = max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * scale, msg=name)


@pytest.mark.parametrize('name', zoo.ALL)
def test_equals_the_slow_form(name):
    model = zoo.build(name, num_classes=3).double().eval()
    assert_same(mte.wrap(model, **zoo.counts(name)), zoo.images(model, dtype=torch.float64))


@pytest.mark.parametrize('name', ['plain', 'avg_pool', 'hybrid', 'eva02', 'rope_mixed', 'dinov3'])
def test_non_square_images_equal_the_slow_form(name):
    patch = 4 if name == 'hybrid' else 8
    model = zoo.build(name, num_classes=3, img_size=(24, 40)).double().eval()
    x = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    assert_same(mte.wrap(model), x, grid=(24 // patch, 40 // patch))


@pytest.mark.parametrize(
    'options',
    [
        dict(n_cls=1, n_pool=1),
        dict(n_cls=0, n_pool=3),
        dict(n_cls=5, n_pool=2, ten=False),
        dict(kernel_size=3),
        dict(kernel_size=1),
        dict(shared_pointwise=False),
        dict(see_global=True),
        dict(independent_heads=False),
    ],
    ids=str,
)
@pytest.mark.parametrize('name', ['plain', 'rope_mixed', 'cait', 'xcit'])
def test_each_option_equals_the_slow_form(name, options):
    model = zoo.build(name, num_classes=3).double().eval()
    assert_same(mte.wrap(model, **options), zoo.images(model, dtype=torch.float64))


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('grid', [(7, 7), (3, 8), (1, 5), (14, 14)])
def test_pooling_without_maps_equals_the_maps(grid, shared):
    pool = AdaptivePooling(6, 3, kernel_size=11, shared_pointwise=shared).double()
    z = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64)
    slow = pooled(pool, z, grid)
    torch.testing.assert_close(pool(z, grid), slow, rtol=0, atol=1e-12)
    maps = pool.weight_maps(z, grid)
    by_maps = (maps * z.transpose(1, 2).reshape(2, 1, 6, *grid)).mean(dim=(3, 4))
    torch.testing.assert_close(by_maps, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize(('mode', 'reduce'), [('avg', torch.mean), ('max', torch.amax)])
def test_plain_pooling_for_the_ablation(mode, reduce):
    wrapped = mte.wrap(zoo.build('plain'), n_cls=0, n_pool=1, pooling=mode)
    tokens = wrapped(zoo.images(wrapped.backbone)).tokens
    assert torch.equal(tokens.pooled[:, 0], reduce(tokens.patches, dim=1))
