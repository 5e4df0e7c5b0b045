"""Classifiers that ask what features know: features and labels to learn from, features to classify."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ['Predict', 'knn_accuracy', 'knn_predict', 'linear_predict']

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def needed(module: str) -> Any:
    """Imports a module of matplotlib or scikit-learn; an ImportError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(
            'mte_timm.analysis draws with matplotlib and classifies with scikit-learn: pip install matplotlib '
            "scikit-learn, or pip install -e '.[analysis]' in a clone of mte-timm"
        ) from e


def knn_predict(
    train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, k: int = 10, temperature: float = 0.07
) -> torch.Tensor:
    """Weighted k-NN by cosine similarity, as DINO evaluates: train (N, D), labels (N,), test (M, D) -> (M,).

    Raises:
        ValueError: features are NaN or infinite, or not as many as labels.
    """
    if len(train) != len(labels):
        raise ValueError(f'labels: {len(labels)} for {len(train)} training features')
    for name, each in (('train', train), ('test', test)):
        if bad := int((~each.flatten(1).isfinite().all(dim=1)).sum()):
            raise ValueError(f'{name}: features of {bad} images of {len(each)} are NaN or infinite')
    train, test = (F.normalize(f.flatten(1) if f.itemsize > 2 else f.flatten(1).float(), dim=1) for f in (train, test))
    labels = labels.flatten().long()
    classes, predictions = int(labels.max()) + 1, []
    for part in torch.split(test, 500):
        similarity, index = (part @ train.T).topk(min(k, len(train)), dim=1)
        votes = similarity.new_zeros(len(part), classes)
        votes.scatter_add_(1, labels[index], ((similarity - similarity[:, :1]) / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def linear_predict(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """Logistic regression of scikit-learn on standardized features: train (N, D), labels (N,), test (M, D) -> (M,)."""
    scaler = needed('sklearn.preprocessing').StandardScaler()
    classifier = needed('sklearn.linear_model').LogisticRegression(max_iter=300)
    x, q = (t.detach().flatten(1).float().cpu().numpy() for t in (train, test))
    classifier.fit(scaler.fit_transform(x), labels.cpu().numpy())
    return torch.from_numpy(classifier.predict(scaler.transform(q))).to(test.device)


def knn_accuracy(
    train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], k: int = 10
) -> float:
    """Percent right of :func:`knn_predict` for pairs of features and labels."""
    labels = test[1].flatten()
    if len(labels) != len(test[0]):
        raise ValueError(f'test: {len(labels)} labels for {len(test[0])} features')
    return 100 * (knn_predict(*train, test[0], k) == labels).double().mean().item()
