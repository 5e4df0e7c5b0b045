"""Evaluation as the paper's: k-NN, linear probing, fine-tuning, patch tokens, concatenation.

Owns accuracies of trained networks on labeled images. Knows nothing of how they were trained.
"""

import copy
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn

import mte_timm as mte
from benchmarks import common
from benchmarks.images import Images
from mte_timm import analysis

__all__ = [
    'accuracies',
    'concatenated',
    'features',
    'fine_tuned',
    'knn',
    'knn_of',
    'patch_accuracies',
    'random_token_accuracies',
    'raw_pixels',
    'same_features_with_tokens',
    'side_by_side',
    'watched',
]

MOST_PROBED = 20_000_000  # values that logistic regression fits in minutes
Labelled = tuple[torch.Tensor, torch.Tensor]


def features(model: nn.Module, images: Images, which: str, device: str = 'cpu') -> Labelled:
    """(N, D) features and (N,) labels of a split."""
    return common.features(model, images.loader(which), device)


def raw_pixels(images: Images) -> dict[str, float]:
    """Of the pixels themselves."""
    flat: Any = nn.Flatten()
    train, test = (features(flat, images, which) for which in ('train', 'test'))
    if train[0].numel() > MOST_PROBED:
        return {'knn': analysis.knn_accuracy(train, test)}
    return {'knn': analysis.knn_accuracy(train, test), 'linear': linear_accuracy(train, test)}


def linear_accuracy(train: Labelled, test: Labelled) -> float:
    """Percent right of logistic regression."""
    return 100 * (analysis.linear_predict(*train, test[0]) == test[1]).double().mean().item()


def without_classifier(backbone: Any) -> Any:
    """A copy of ``backbone`` that returns features."""
    backbone = copy.deepcopy(backbone)
    if getattr(backbone, 'num_classes', 0):
        backbone.reset_classifier(0)
    return backbone


def knn(network: Any, images: Images, device: str = 'cpu') -> float:
    """k-NN of the features that the plain model of ``network`` gives."""
    return knn_of(network.backbone, images, device)


def knn_of(backbone: Any, images: Images, device: str = 'cpu') -> float:
    backbone = without_classifier(backbone)
    return analysis.knn_accuracy(*(features(backbone, images, which, device) for which in ('train', 'test')))


def accuracies(network: Any, images: Images, device: str = 'cpu', linear: bool = True) -> dict[str, Any]:
    """Percentages of a network's backbone, and of its auxiliary tokens if it has any.

    ``knn`` and ``linear`` are of the features that the plain model gives. ``knn with tokens`` is of the same features
    computed with auxiliary tokens present, ``knn of the ensemble`` of the mean of auxiliary tokens, each of length 1,
    ``knn of tokens`` of each token.
    """
    backbone = without_classifier(network.backbone)
    train, test = (features(backbone, images, which, device) for which in ('train', 'test'))
    out: dict[str, Any] = {'knn': analysis.knn_accuracy(train, test)}
    if linear:
        out['linear'] = linear_accuracy(train, test)
    if isinstance(network, mte.MTE):
        out.update(token_accuracies(network.to(device), images))
    return out


def token_accuracies(network: mte.MTE, images: Images) -> dict[str, Any]:
    train, test = (analysis.collect(network, images.loader(which)) for which in ('train', 'test'))
    each = {
        name: analysis.knn_accuracy((x, train.labels), (q, test.labels))
        for name, x, q in zip(train.names, train.features, test.features)
    }
    means = [torch.stack([F.normalize(f, dim=1) for f in t.features[1:]]).mean(dim=0) for t in (train, test)]
    ensemble = analysis.knn_accuracy((means[0], train.labels), (means[1], test.labels))
    return {'knn with tokens': each.pop('global'), 'knn of tokens': each, 'knn of the ensemble': ensemble}


@torch.no_grad()
def watched(network: Any, images: Images, device: str = 'cpu', to: Optional[Path] = None) -> dict[str, Any]:
    """k-NN of a network in training, of each of its tokens, and how alike auxiliary CLS tokens are.

    The forward pass is in bfloat16, unlike that of ``accuracies``. Features are kept at ``to``.
    """
    parts: list[Labelled] = []
    out: dict[str, Any] = {}
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        if not isinstance(network, mte.MTE):
            backbone = without_classifier(network.backbone)
            parts = [features(backbone, images, which, device) for which in ('train', 'test')]
        else:
            network.to(device)
            train, test = (analysis.collect(network, images.loader(which)) for which in ('train', 'test'))
            parts = [(t.features[0], t.labels) for t in (train, test)]
            out['tokens'] = {
                name: analysis.knn_accuracy((x, train.labels), (q, test.labels))
                for name, x, q in zip(train.names[1:], train.features[1:], test.features[1:])
            }
            out['cka'] = [[round(v, 3) for v in row] for row in analysis.cka(test).tolist()]
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        torch.save([(x.half(), y) for x, y in parts], to)
    return {'knn': analysis.knn_accuracy(*((x.float(), y) for x, y in parts)), **out}


def side_by_side(a: list[Labelled], b: list[Labelled]) -> float:
    """k-NN of the features of two networks, each of length 1, side by side."""
    splits = [
        (torch.cat([F.normalize(x.float(), dim=1) for x in (one, other)], dim=1), labels)
        for (one, labels), (other, _) in zip(a, b)
    ]
    return analysis.knn_accuracy(*splits)


@torch.no_grad()
def same_features_with_tokens(network: mte.MTE, images: Images, device: str = 'cpu') -> bool:
    """Whether features of the test images are the same to the last bit with auxiliary tokens present and without."""
    network.to(device).eval()
    backbone = without_classifier(network.backbone).eval()
    batches = (x.to(device) for x, _ in images.loader('test'))
    return all(torch.equal(network(x).tokens.global_token, backbone(x)) for x in batches)


def random_token_accuracies(backbone: Any, images: Images, device: str = 'cpu') -> dict[str, Any]:
    """Of auxiliary tokens that were never trained, on a ViT that may be: what a better encoder gives them.

    Paper Fig. 12: there they are frozen during the plain method's training, which they don't touch, so that adding them
    afterwards is the same. They are of one draw for all networks.
    """
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        network = mte.wrap(without_classifier(backbone))
    return token_accuracies(network.to(device), images)


def concatenated(networks: list[Any], images: Images, device: str = 'cpu') -> float:
    """k-NN of the features of several networks side by side, each of length 1 (paper Tab. 4)."""
    splits = []
    for which in ('train', 'test'):
        each = [features(without_classifier(n.backbone), images, which, device) for n in networks]
        splits.append((torch.cat([F.normalize(x, dim=1) for x, _ in each], dim=1), each[0][1]))
    return analysis.knn_accuracy(*splits)


@torch.no_grad()
def patch_accuracies(backbone: Any, images: Images, top: tuple[int, ...] = (), device: str = 'cpu') -> dict[str, float]:
    """k-NN of averaged patch tokens: all of them, and the ``top`` ones by the class token's attention.

    Attention is that of the last block, mean over heads (paper Tab. 3 and Fig. 14).
    """
    backbone.eval().to(device)
    block, prefix = backbone.blocks[-1], backbone.num_prefix_tokens
    seen: dict[str, torch.Tensor] = {}
    handle = block.norm1.register_forward_hook(lambda module, inputs, out: seen.update(x=out))
    collected: dict[str, dict[str, torch.Tensor]] = {}
    try:
        for which in ('train', 'test'):
            parts: dict[str, list[torch.Tensor]] = {}
            for x, y in images.loader(which):
                patches = backbone.forward_features(x.to(device))[:, prefix:]
                order = class_attention(block.attn, seen['x'])[:, prefix:].argsort(dim=1, descending=True)
                ordered = patches.gather(1, order.unsqueeze(2).expand_as(patches))
                for k in (*top, patches.shape[1]):
                    parts.setdefault(f'top {k}', []).append(ordered[:, :k].mean(dim=1).cpu())
                parts.setdefault('labels', []).append(y)
            collected[which] = {name: torch.cat(part) for name, part in parts.items()}
    finally:
        handle.remove()
    train, test = collected['train'], collected['test']
    names = [f'top {k}' for k in top] + [list(train)[-2]]
    accuracy = {n: analysis.knn_accuracy((train[n], train['labels']), (test[n], test['labels'])) for n in names}
    return {**accuracy, 'all': accuracy[names[-1]]}


def class_attention(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention of the first token to all, (B, N), mean over heads, for the input (B, N, D) of timm's attention."""
    b, n, _ = x.shape
    q, k, _ = attn.qkv(x).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights: torch.Tensor = (q[:, :, :1] @ k.mT * attn.scale).softmax(dim=-1)
    return weights[:, :, 0].mean(dim=1)


def fine_tuned(
    backbone: nn.Module,
    images: Images,
    epochs: int = 5,
    lr: float = 5e-4,
    layer_decay: float = 0.75,
    seed: int = 0,
    device: str = 'cpu',
) -> float:
    """Percent right after fine-tuning a copy of ``backbone`` with layer-wise decay of the learning rate."""
    model: Any = copy.deepcopy(backbone).requires_grad_(True)  # a teacher is frozen
    pixels, labels = images.pixels('train', images.size)
    torch.manual_seed(seed)
    model.reset_classifier(int(labels.max()) + 1)
    model.to(device).train()
    optimizer = torch.optim.AdamW(param_groups_layer_decay(model, 0.05, layer_decay=layer_decay))
    generator = torch.Generator().manual_seed(seed)
    total = epochs * (len(pixels) // 64)
    orders = (torch.randperm(len(pixels), generator=generator) for _ in range(epochs))
    batches = (indices for order in orders for indices in order.split(64) if len(indices) == 64)
    for step, indices in enumerate(batches):
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_scale'] * common.schedule(step, total)
        x = images.normalized(pixels[indices].to(device))
        loss = F.cross_entropy(model(x), labels[indices].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits, truth = features(model, images, 'test', device)
    return 100 * (logits.argmax(dim=1) == truth).double().mean().item()
