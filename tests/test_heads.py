"""Independent heads run as one, held to one by one."""

import copy

import lookalikes as like
import pytest
import torch
import zoo
from torch import nn

import mte_timm as mte
from mte_timm.heads import AuxiliaryHeads


class Normalising(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x):
        return nn.functional.normalize(self.mlp(x), dim=-1)


HEADS = {
    'linear': lambda: nn.Linear(8, 5),
    'norms': lambda: nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 5)),
    'last norm': lambda: nn.Sequential(nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12, affine=False)),
    'normalised': lambda: Normalising(8),
}


def both(make, dtype=torch.float64, training=True):
    one = AuxiliaryHeads([make() for _ in range(4)], 4).to(dtype).train(training)
    many = copy.deepcopy(one)
    one.batched, many.batched = True, False
    return one, many


@pytest.mark.parametrize('training', (True, False))
@pytest.mark.parametrize('name', HEADS)
def test_run_as_one_equals_one_by_one(name, training):
    one, many = both(HEADS[name], training=training)
    assert one._runs_as_one(torch.randn(1))
    for _ in range(2):
        tokens = torch.randn(6, 4, 8, dtype=torch.float64)
        inputs = [tokens.clone().requires_grad_() for _ in range(2)]
        ours, theirs = one(inputs[0]), many(inputs[1])
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        weights = torch.randn_like(ours)
        (ours * weights).sum().backward()
        (theirs * weights).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-10)
        for (n, a), b in zip(one.named_parameters(), many.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=n)
        for (n, a), b in zip(one.named_buffers(), many.buffers()):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=n)
    assert one.state_dict().keys() == many.state_dict().keys()
    many.load_state_dict(one.state_dict())


# the CPU's kernel of a batch norm without weights refuses bfloat16 beside its statistics in float32
@pytest.mark.parametrize('name, mixed', [(n, m) for n in HEADS for m in (True, False) if (n, m) != ('last norm', True)])
def test_in_bfloat16_no_further_from_the_truth_than_one_by_one(name, mixed):
    one, many = both(HEADS[name], torch.float32 if mixed else torch.bfloat16)
    truth = copy.deepcopy(many).double()
    tokens = torch.randn(256, 4, 8).bfloat16()
    expected = truth(tokens.double())
    errors = []
    for heads in (one, many):
        with torch.autocast('cpu', torch.bfloat16, enabled=mixed):
            errors.append((heads(tokens).double() - expected).abs().mean().item())
    assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize('change', ('shape', 'eps', 'dropout', 'mode', 'hook', 'layer', 'synchronised'))
def test_heads_that_differ_run_one_by_one(change):
    made = [HEADS['norms']() for _ in range(4)]
    if change == 'shape':
        made[2] = nn.Sequential(nn.Linear(8, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 5))
    elif change == 'eps':
        made[2][3].eps = 0.1
    elif change == 'dropout':
        made[2][2] = nn.Dropout(0.0)
    heads = AuxiliaryHeads(made, 4)
    heads.batched = True
    if change == 'mode':
        heads[2].eval()
    elif change == 'hook':
        heads[0].register_forward_hook(lambda m, args, out: out)
    elif change == 'layer':
        heads[3][2] = nn.GELU()
    elif change == 'synchronised':
        heads = nn.SyncBatchNorm.convert_sync_batchnorm(heads)
    assert not heads._runs_as_one(torch.randn(1))
    if change != 'synchronised':
        tokens = torch.randn(6, 4, 8)
        expected = torch.stack([head(t) for head, t in zip(heads, tokens.unbind(1))]).mean(dim=0)
        assert torch.equal(heads(tokens), expected)


def test_a_whole_model_trains_the_same_and_compiles():
    torch.manual_seed(0)
    model = mte.wrap('test_vit', head=lambda dim: like.Head(dim, 16, use_bn=True))
    twin = copy.deepcopy(model)
    model.aux_heads.batched = True
    x = torch.randn(4, 3, 160, 160)
    one_graph = torch.__version__ >= '2.6'  # older dynamo does not trace the making of tensor subclasses
    for m in (torch.compile(model, backend='aot_eager', fullgraph=one_graph), twin):
        m(x).aux.square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize('independent', [True, False])
def test_one_head_for_all_is_refused(independent):
    one = nn.Linear(48, 8)
    with pytest.raises(TypeError, match=r'same Linear twice.*lambda dim: MyHead'):
        mte.wrap(zoo.build('plain'), head=lambda dim: one, independent_heads=independent)
