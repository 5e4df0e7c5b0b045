"""Each fast path beside the slow one: the same in float64, and in bfloat16 no further from float64 than the slow one.

Gradients included. tests/test_exactness.py holds whole models.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mte_timm.attention import observer_mask
from mte_timm.tokens import AdaptivePooling, TokenEnhancing


class Pooling(nn.Module):
    def __init__(self, n_pool=6, shared_pointwise=True):
        super().__init__()
        self.pool = AdaptivePooling(16, n_pool, 11, shared_pointwise)

    def inputs(self):
        return (torch.randn(4, 48, 16),)

    def fast(self, z):
        return self.pool(z, (6, 8))

    def slow(self, z):
        maps = self.pool.weight_maps(z, (6, 8))
        return (maps * z.to(maps.dtype).transpose(1, 2).reshape(4, 1, 16, 6, 8)).mean(dim=(3, 4))


class Enhancing(nn.Module):
    def __init__(self):
        super().__init__()
        self.ten = TokenEnhancing(24, 3)

    def inputs(self):
        return torch.randn(4, 5, 24), torch.randn(4, 49, 24)

    def fast(self, q, z):
        return self.ten._attend_to_patches(q, z)

    def slow(self, q, z):
        return self.ten._attend_to_projections(q, z)


class Observers(nn.Module):
    def inputs(self):
        return torch.randn(3, 2, 30, 3, 4, 8).unbind(0)

    def attend(self, q, k, v, mask):
        q, k, v = (t.permute(0, 2, 3, 1, 4).flatten(1, 2) for t in (q, k, v))  # B, H * 4, N, d
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def fast(self, q, k, v):
        return self.attend(q, k, v, observer_mask(26, 4, 1))

    def slow(self, q, k, v):
        return self.attend(q, k, v, observer_mask(26, 4, 1).clone())


PATHS = {
    'pooling': Pooling,
    'pooling, 1 token': lambda: Pooling(1),
    'pooling, own point-wise': lambda: Pooling(3, False),
    'TEN': Enhancing,
    'observers': Observers,
}


def values(path, run, inputs, autocast=False):
    """Output and gradients of inputs and parameters."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    path.zero_grad(set_to_none=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        out = run(*inputs)
    torch.manual_seed(1)
    (out * torch.randn(out.shape, dtype=torch.float64).to(out.dtype)).sum().backward()
    grads = {f'gradient of input {i}': x.grad for i, x in enumerate(inputs) if x.grad is not None}
    grads |= {f'gradient of {n}': p.grad for n, p in path.named_parameters() if p.grad is not None}
    return {'output': out.detach(), **grads}


@pytest.mark.parametrize('name', PATHS)
def test_same_in_float64(name):
    torch.manual_seed(0)
    path = PATHS[name]().double()
    inputs = [x.double() for x in path.inputs()]
    fast, slow = values(path, path.fast, inputs), values(path, path.slow, inputs)
    assert fast.keys() == slow.keys()
    for what, value in slow.items():
        torch.testing.assert_close(fast[what], value, rtol=0, atol=1e-10, msg=what)


@pytest.mark.parametrize('autocast', [True, False], ids=['autocast', 'pure'])
@pytest.mark.parametrize('name', PATHS)
def test_no_further_from_float64_in_bfloat16(name, autocast):
    errors = {'fast': {}, 'slow': {}}
    for seed in range(20):
        torch.manual_seed(seed)
        path = PATHS[name]().bfloat16()
        inputs = [x.bfloat16() for x in path.inputs()]
        exact_path = copy.deepcopy(path).double()
        exact = values(exact_path, exact_path.slow, [x.double() for x in inputs])
        if autocast:
            path, inputs = path.float(), [x.float() for x in inputs]
        for which in errors:
            found = values(path, getattr(path, which), inputs, autocast)
            for what, value in exact.items():
                error = (found[what].double() - value).square().mean()
                errors[which].setdefault(what, []).append(error)
    for what in errors['slow']:
        fast, slow = (torch.stack(errors[which][what]).mean().sqrt().item() for which in ('fast', 'slow'))
        print(f'{name}, {what}: {fast:.2e} fast, {slow:.2e} slow')
        # estimates from 20 draws; a gradient that is the sum of two kernels' results is rounded once more
        summed = name == 'observers' and what in ('gradient of input 1', 'gradient of input 2')
        assert fast <= (1.2 if summed else 1.06) * slow + 1e-12, what


def test_pooling_in_float16_does_not_overflow():
    pool = AdaptivePooling(4, 2)
    z = torch.full((1, 28 * 28, 4), 12.0)
    for pw in pool.pw:
        nn.init.eye_(pw.weight)
        nn.init.zeros_(pw.bias)
    exact = pool(z, (28, 28))
    halves = copy.deepcopy(pool).half()(z.half(), (28, 28)).float()
    assert halves.isfinite().all()
    torch.testing.assert_close(halves, exact, rtol=2e-3, atol=2e-2)


def test_pooling_gives_the_gradients_that_are_asked_for():
    pool = AdaptivePooling(6, 2).requires_grad_(False)
    z = torch.randn(2, 12, 6, requires_grad=True)
    pool(z, (3, 4)).sum().backward()
    assert z.grad is not None and all(p.grad is None for p in pool.parameters())
    pool.requires_grad_(True)
    pool(z.detach(), (3, 4)).sum().backward()
    assert all(p.grad is not None for p in pool.parameters())
    grads = torch.autograd.grad(pool(z, (3, 4)).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiate twice'):
        grads[0].sum().backward()


def test_a_key_projection_that_is_no_plain_layer_is_called():
    ten, q, z = TokenEnhancing(24, 3), torch.randn(2, 4, 24), torch.randn(2, 49, 24)
    calls = []
    expected = ten(q, z)
    ten.kv.register_forward_hook(lambda module, args, out: calls.append(out.shape) or 2 * out)
    assert not torch.allclose(ten(q, z), expected) and calls == [(2, 49, 48)]
