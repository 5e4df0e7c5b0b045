"""Own tokens never see observers, and the two unmasked calls are the dense mask exactly."""

import pytest
import timm
import torch
import torch.nn.functional as F
import zoo
from slow_form import dense_mask
from torch import nn

import mte_timm as mte
from mte_timm.attention import ObserverMask, observer_mask


@pytest.mark.parametrize('num_hidden', [0, 1, 2])
def test_mask_is_the_dense_mask(num_hidden):
    mask = observer_mask(6, 3, num_hidden)
    assert isinstance(mask, ObserverMask) and mask.dtype == torch.bool
    assert torch.equal(mask & True, dense_mask(6, 3, num_hidden))


@pytest.mark.parametrize('num_hidden', [0, 1])
def test_two_calls_equal_the_dense_mask(num_hidden):
    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64).requires_grad_().unbind(0)
    fast = F.scaled_dot_product_attention(q, k, v, attn_mask=observer_mask(6, 3, num_hidden))
    slow = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(6, 3, num_hidden))
    assert type(fast) is torch.Tensor
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    weight = torch.randn_like(fast)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (fast, slow))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_added_to_scores_it_is_minus_infinity():
    scores, mask = torch.randn(2, 9, 9), observer_mask(6, 3, 1)
    expected = scores.masked_fill(~dense_mask(6, 3, 1), float('-inf'))
    for total in (scores + mask, mask + scores, torch.add(scores, mask)):
        assert type(total) is torch.Tensor and torch.equal(total, expected)


def test_causal_contradicts_the_mask():
    q = torch.randn(1, 1, 9, 8)
    with pytest.raises(ValueError, match='is_causal'):
        F.scaled_dot_product_attention(q, q, q, attn_mask=observer_mask(6, 3), is_causal=True)


@pytest.mark.parametrize(
    ('name', 'sizes'),
    [
        *((name, [None]) for name in zoo.ATTENDING),
        *((name, [(32, 32), (16, 24)]) for name in ('plain', 'avg_pool', 'eva02', 'rope_mixed', 'dinov3')),
    ],
)
def test_backbone_tokens_never_see_observers(name, sizes):
    """Whatever those are, outputs and patches are the plain model's, of views of one size and of two."""
    model = zoo.build(name, num_classes=5, **({} if sizes == [None] else {'dynamic_img_size': True})).train()
    batches = [zoo.images(model, 4) if size is None else torch.randn(4, 3, *size) for size in sizes]
    plain = [model.forward_features(batch) for batch in batches]
    # after the norm that some models keep for after pooling
    patches = [getattr(model, 'fc_norm', nn.Identity())(f[:, zoo.num_prefix(model) :]) for f in plain]
    wrapped = mte.wrap(model)

    def in_turns(batches):
        return [half for halves in zip(*(batch.split(2) for batch in batches)) for half in halves]

    for _ in range(2):
        out = wrapped(in_turns(batches))
        assert torch.equal(out.output, torch.cat(in_turns([model.forward_head(f) for f in plain])))
        assert all(torch.equal(a, b) for a, b in zip(out.tokens.patches, in_turns(patches), strict=True))
        zoo.perturb_auxiliaries(wrapped)


@pytest.mark.parametrize('name', zoo.ATTENDING)
def test_unfused_attention_computes_the_same(name, monkeypatch):
    model = zoo.build(name).double().eval()
    if isinstance(model, timm.models.Eva) and zoo.timm_before(1, 0, 26):
        pytest.skip('the unfused attention of Eva took padding masks only')
    wrapped = mte.wrap(model)
    x = zoo.images(model, dtype=torch.float64)
    fused = wrapped(x)
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            monkeypatch.setattr(module, 'fused_attn', False)
    unfused = wrapped(x)
    torch.testing.assert_close(unfused.tokens.aux_cls, fused.tokens.aux_cls, rtol=0, atol=1e-10)
    zoo.perturb_auxiliaries(wrapped)
    assert torch.equal(wrapped(x).output, unfused.output)


def test_stochastic_depth_draws_as_in_the_plain_model():
    model = timm.create_model('vit_tiny_patch16_224', drop_path_rate=0.5, num_classes=0, **zoo.VIT).train()
    wrapped, x = mte.wrap(model), torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    assert torch.equal(wrapped(x).output, plain)


def test_masks_are_made_once_and_never_kept_from_a_tracer_or_inference():
    from torch._subclasses import FakeTensorMode

    assert observer_mask(5, 2, 1) is observer_mask(5, 2, 1)
    assert observer_mask(5, 2, 1) is not observer_mask(5, 2, 0)
    with FakeTensorMode():
        observer_mask(7, 2, 1)
    with torch.inference_mode():
        observer_mask(9, 2, 1)
    for num_own in (7, 9):
        mask = observer_mask(num_own, 2, 1)
        assert mask.shape == (num_own + 2, num_own + 2) and mask.sum() > 0 and not mask.is_inference()
