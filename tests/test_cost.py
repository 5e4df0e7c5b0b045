"""The training cost that the paper states: 6.1G to 6.4G multiply-adds for a forward of ViT-S/16 with iBOT's head."""

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mte_timm as mte


class IBOTHead(nn.Module):
    """The layers of iBOT's head: an MLP and 8,192 shared prototypes over the class token and all patches."""

    def __init__(self, dim):
        super().__init__()
        layers = [nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)]
        self.mlp = nn.Sequential(*layers)
        self.last_layer = nn.Linear(256, 8192, bias=False)

    def forward(self, x):
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1))


def giga_macs(run):
    """Multiply-adds of ``run`` in billions; the math kernel of attention is the one that is counted everywhere."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops() / 2e9


def test_cost_is_the_papers():
    model, x = timm.create_model('vit_small_patch16_224', num_classes=0), torch.randn(1, 3, 224, 224)
    head = IBOTHead(384)
    backbone = giga_macs(lambda: model(x))
    plain = giga_macs(lambda: head(model.forward_features(x)))
    wrapped = mte.wrap(model, head=IBOTHead)

    def with_mte():
        out = wrapped(x)
        wrapped.aux.global_head(out.tokens.patches)
        return out.tokens.patches

    shipped = giga_macs(with_mte)
    pool, ten, z, q = wrapped.aux.pool, wrapped.aux.ten, with_mte(), torch.randn(1, 4, 384)
    maps, correlation = (giga_macs(lambda f=f: f(z, (14, 14))) for f in (pool.weight_maps, pool))
    keys, folded = (giga_macs(lambda f=f: f(q, z)) for f in (ten._attend_to_projections, ten._attend_to_patches))
    assert round(plain, 1) == 6.1
    # as the paper writes it: pooling through the maps W_i, keys and values of every patch in TEN
    assert round(shipped - correlation + maps - folded + keys, 1) == 6.4
    assert 6.25 < shipped < 6.3  # through one correlation and folded projections, which is the same and cheaper
    assert giga_macs(lambda: mte.strip(wrapped)(x)) == backbone


def test_pooling_costs_almost_the_same_for_any_number_of_tokens():
    with torch.device('meta'):
        z = torch.randn(1, 196, 384)
        one, many = (giga_macs(lambda n=n: mte.tokens.AdaptivePooling(384, n)(z, (14, 14))) for n in (1, 64))
    assert many < 1.1 * one


def test_looking_at_tokens_each_hundred_steps_is_below_a_hundredth():
    def head(dim):
        return nn.Sequential(nn.Linear(dim, 2048), nn.Linear(2048, 256))

    model, x = mte.wrap('vit_small_patch16_224', head=head), torch.randn(4, 3, 224, 224)
    forward = giga_macs(lambda: model(x))
    heads = giga_macs(lambda: [h(t) for h, t in zip(model.aux.heads, torch.randn(10, 4, 384))])
    assert heads / 100 < 0.01 * forward  # and a step is three forwards of the student and one of the teacher
