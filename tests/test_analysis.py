"""Figures about tokens: held to their definitions, written out, and to cases whose answer is known."""

import math

import lookalikes as like
import pytest
import torch
import zoo
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mte_timm as mte
from mte_timm import analysis

TOKENS = ('cls 1', 'cls 2', 'pooled 1', 'pooled 2', 'pooled 3')


def images_of(model, n=24, classes=3):
    x = torch.cat([zoo.images(model) for _ in range(n)])[:n]
    return [(x[i : i + 5], torch.arange(i, min(i + 5, n)) % classes) for i in range(0, n, 5)]


@pytest.fixture
def wrapped():
    return mte.wrap(zoo.build('plain'), n_cls=2, n_pool=3, head=lambda dim: like.Head(dim, 20))


@pytest.fixture
def drawn():
    """Draws figures, as in a window, and closes them."""
    matplotlib = pytest.importorskip('matplotlib')
    matplotlib.use('Agg')

    def draw(*figures):
        for figure in figures:
            figure.canvas.draw()
            matplotlib.pyplot.close(figure)

    return draw


def tokens_of(*features, labels=None):
    labels = torch.arange(len(features[0])) % 3 if labels is None else labels
    names = ('global', *(f'cls {i}' for i in range(1, len(features))))
    return analysis.Tokens(names, features, features[1:], labels)


def specialists():
    """One token tells class 0 from the rest, the other class 2; only both together tell all three."""
    labels = torch.arange(120) % 3
    each = [nn.functional.one_hot((labels == c).long(), 2) + 0.01 * torch.randn(120, 2) for c in (0, 2)]
    return tokens_of(torch.cat(each, dim=1), *each, labels=labels)


# --- collecting


def test_collect_gives_what_the_model_gives(wrapped):
    loader = images_of(wrapped.backbone)
    wrapped.train()
    tokens = analysis.collect(wrapped, loader)
    assert wrapped.training and tokens.names == ('global', *TOKENS)
    wrapped.eval()
    with torch.no_grad():
        out = wrapped(torch.cat([x for x, _ in loader])).tokens
    expected = [out.global_token, *out.aux_cls.unbind(1), *out.pooled.unbind(1)]
    for ours, theirs in zip(tokens.features, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, head, token in zip(tokens.projections, wrapped.aux.heads, expected[1:], strict=True):
        torch.testing.assert_close(ours, head(token))
    assert torch.equal(tokens.labels, torch.arange(24) % 3)
    assert all(f.untyped_storage().nbytes() == f.nbytes for f in tokens.features)  # not all patches
    for unlabeled in ((x for x, _ in loader), ([x] for x, _ in loader)):  # alone, and as from a TensorDataset
        some = analysis.collect(wrapped, unlabeled, max_images=7)
        assert len(some.labels) == 7 and (some.labels == -1).all() and all(len(f) == 7 for f in some.features)


def test_bad_input_is_named(wrapped):
    x = zoo.images(wrapped.backbone)
    with pytest.raises(TypeError, match='model'):
        analysis.collect(wrapped.backbone, [])
    with pytest.raises(ValueError, match='loader'):
        analysis.collect(wrapped, [])
    unlabeled = analysis.collect(wrapped, [x])
    with pytest.raises(ValueError, match='labels'):
        analysis.accuracy_by_class(unlabeled, unlabeled)
    # several views, or labels that are none
    for batch in (([x, x], torch.zeros(len(x))), [x, x], (x, torch.zeros(len(x), 3)), (x, torch.zeros(len(x)))):
        with pytest.raises(ValueError, match='loader: gives'):
            analysis.collect(wrapped, [batch])


@pytest.mark.filterwarnings('ignore:lbfgs')
def test_models_in_half_precision_are_looked_at_too(wrapped, drawn):
    loader = images_of(wrapped.backbone)
    wrapped.bfloat16()
    tokens = analysis.collect(wrapped, loader)
    assert all(f.dtype == torch.float32 for f in tokens.features)
    assert analysis.pooling_maps(wrapped, loader[0][0]).isfinite().all()
    drawn(analysis.plot_pooling(wrapped, loader[0][0]), analysis.plot_kernels(wrapped))
    x, q, y = tokens.features[0], tokens.features[0][:5], tokens.labels
    for predict in (analysis.knn_predict, analysis.linear_predict):
        for dtype in (torch.bfloat16, torch.float64):
            assert predict(x.to(dtype), y, q.to(dtype)).shape == (5,)
    assert torch.equal(analysis.knn_predict(x.double(), y, q.double()), analysis.knn_predict(x, y, q))


# --- measures


def test_cka_is_its_definition():
    x = torch.randn(40, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    y, noise = 3 * x @ rotation + 7, torch.randn(40, 9)
    values = analysis.cka(tokens_of(x, y, noise))
    assert values.diagonal().allclose(torch.ones(3, dtype=torch.float64))
    assert values[0, 1].item() == pytest.approx(1, abs=1e-5)  # rotated, scaled, moved: the same representation
    centring = torch.eye(40, dtype=torch.float64) - 1 / 40

    def hsic(a, b):  # by the kernels
        return (centring @ (a @ a.T) @ centring * (b @ b.T)).sum()

    a, b = x.double(), noise.double()
    assert values[0, 2].item() == pytest.approx((hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt()).item(), abs=1e-9)
    assert values[0, 2] < 0.6 and torch.equal(values, values.T)
    constant = analysis.cka(tokens_of(x, torch.ones(40, 4)))  # is like no other
    assert constant.tolist() == [[1, 0], [0, 1]]


def test_knn_is_weighted_by_similarity():
    angles, labels = torch.tensor([0.0, 0.1, 1.0, 1.1, 1.2]), torch.tensor([0, 0, 1, 1, 1])
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[0.3], [0.9]])
    query = 5 * torch.cat([query.cos(), query.sin()], dim=1)
    assert analysis.knn_predict(points, labels, query, k=5).tolist() == [0, 1]  # three farther ones don't outvote two
    assert analysis.knn_predict(points, labels, query, k=5, temperature=1e3).tolist() == [1, 1]
    assert analysis.knn_accuracy((points, labels), (query, torch.tensor([0, 0]))) == 50
    assert analysis.knn_accuracy((points, labels[:, None]), (query, torch.tensor([[0], [0]]))) == 50  # as of MedMNIST
    with pytest.raises(ValueError, match='test: 3 labels for 2'):
        analysis.knn_accuracy((points, labels), (query, torch.zeros(3)))


def test_a_low_temperature_of_knn_does_not_overflow():
    x, labels = torch.randn(300, 4), torch.randint(5, (300,))
    assert torch.equal(*(analysis.knn_predict(f, labels, f[:100], temperature=0.005) for f in (x, x.double())))


def test_nan_is_no_number_that_looks_healthy():
    x, labels = torch.randn(40, 5), torch.arange(40) % 4
    broken = x.clone()
    broken[3, 2] = math.nan
    assert analysis.cka(tokens_of(x, broken))[0, 1].isnan()
    assert analysis.Health({'global': math.nan, 'cls 1': 0.5}, {}).collapsed == ('global',)
    for train, test, name in ((broken, x, 'train'), (x, broken, 'test')):
        with pytest.raises(ValueError, match=f'{name}: features of 1 images of 40'):
            analysis.knn_accuracy((train, labels), (test, labels))
    with pytest.raises(ValueError, match='labels: 41 for 40'):
        analysis.knn_predict(x, torch.zeros(41), x)
    assert analysis.knn_accuracy((x, labels.to(torch.uint8)), (x, labels), k=1) == 100


@pytest.mark.parametrize('predict', [analysis.knn_predict, analysis.linear_predict])
def test_tokens_that_know_different_classes(predict):
    tokens = specialists()
    by_class = analysis.accuracy_by_class(tokens, tokens, predict)
    assert by_class.shape == (3, 3) and (by_class[0] == 100).all()
    assert by_class[1, 0] == 100 and by_class[2, 2] == 100
    assert by_class[1, 1:].sum() < 150 and by_class[2, :2].sum() < 150
    won = analysis.winners(by_class, tokens.names)
    assert won.keys() == {'cls 1', 'cls 2'} and won['cls 1'] >= 1 and won['cls 2'] >= 1
    pairs = analysis.pair_accuracy(tokens, tokens, predict)
    assert pairs[0, 1] == 100 and pairs[0, 0] < 90 and pairs[1, 1] < 90


def test_accuracy_of_tokens_and_of_their_ensemble():
    tokens = specialists()
    values = analysis.accuracy(tokens, tokens)
    assert list(values) == ['global', 'cls 1', 'cls 2', 'ensemble']
    assert values['global'] == values['ensemble'] == 100 and max(values['cls 1'], values['cls 2']) < 90


def test_classes_without_test_images_have_no_accuracy(drawn):
    tokens = tokens_of(torch.randn(24, 4), torch.randn(24, 4), labels=torch.tensor([0, 2] * 12))
    by_class = analysis.accuracy_by_class(tokens, tokens)
    assert by_class[:, 1].isnan().all() and by_class[:, [0, 2]].isfinite().all()
    drawn(analysis.plot_accuracy_by_class(tokens, tokens))


def test_winners_need_to_win_alone_and_a_tie_is_counted_as_one():
    names = ('global', 'cls 1', 'pooled 1')
    by_class = torch.tensor([[99.0, 99.0, 99.0], [50.0, 60.0, 70.0], [50.0, 70.0, 60.0]])
    assert analysis.winners(by_class, names) == {'cls 1': 1, 'pooled 1': 1}
    by_class = torch.tensor([[99.0, 99.0], [70.0, 60.0], [70.0, 50.0]])
    assert analysis.winners(by_class, names) == {'cls 1': 1, 'pooled 1': 0}
    assert analysis.winners(by_class, names, tied=True) == {'cls 1': 1, 'pooled 1': 1}


def test_nmi_of_pairs(wrapped):
    sklearn = pytest.importorskip('sklearn.metrics')
    tokens = analysis.collect(wrapped, images_of(wrapped.backbone))
    values = analysis.pair_nmi(tokens, wrapped)
    mean = (tokens.projections[0] + tokens.projections[3]) / 2
    pseudo = wrapped.aux.global_head.last_layer(mean).argmax(dim=1)
    expected = sklearn.normalized_mutual_info_score(tokens.labels.numpy(), pseudo.numpy())
    assert values.shape == (5, 5) and values[0, 3].item() == pytest.approx(expected)
    clear = 10 * nn.functional.one_hot(tokens.labels, 8).float()
    known = tokens._replace(projections=(clear, clear + 0.01))
    assert analysis.pair_nmi(known, wrapped, clusters=3).min().item() == pytest.approx(1)
    with pytest.raises(ValueError, match='clusters='):
        analysis.pair_nmi(tokens, mte.wrap(zoo.build('plain')))


def test_pooling_maps_sum_to_the_tokens(wrapped):
    x = zoo.images(wrapped.backbone)
    maps, tokens = analysis.pooling_maps(wrapped, x), wrapped.eval()(x).tokens
    assert maps.shape == (len(x), 3, *tokens.grid) and (maps >= 0).all()
    assert (tokens.pooled.norm(dim=2) <= maps.mean(dim=(2, 3)) + 1e-5).all()  # a mean is no longer than the mean length
    assert torch.equal(analysis.pooling_kernels(wrapped)[1], wrapped.aux.pool.dw[1].weight[:, 0])
    with pytest.raises(ValueError, match='n_pool'):
        analysis.pooling_kernels(mte.wrap(zoo.build('plain'), n_pool=0))


# --- health


def test_collapse_is_seen():
    healthy = analysis.collapse(torch.randn(64, 32))
    assert not healthy.collapsed and healthy.rank > 15 and healthy.entropy_of_mean > 0.8
    same = analysis.collapse(torch.randn(1, 32).repeat(64, 1) * 5)
    assert same.collapsed and same.rank == 0 and same.entropy_of_mean < 0.5
    for scale in (0.05, 0.2, 0.5, 5.0):
        nearly = analysis.collapse(scale * torch.randn(1, 256) + 1e-3 * torch.randn(128, 256))
        assert nearly.collapsed and nearly.rank > 100
    prototypes = nn.functional.normalize(torch.randn(4096, 256), dim=1)
    early = nn.functional.normalize(torch.randn(64, 256), dim=1) @ prototypes.T
    assert not analysis.collapse(early).collapsed
    uniform = analysis.collapse(1e-4 * torch.randn(64, 32))
    assert uniform.collapsed and uniform.mean_entropy == pytest.approx(1, abs=1e-4)
    line = analysis.collapse(torch.linspace(-3, 3, 64)[:, None] * torch.randn(1, 32))
    assert line.collapsed and line.rank == pytest.approx(1, abs=1e-3)
    for few in (torch.randn(64, 2), torch.randn(3, 32)):  # which lie nearly on a line always
        assert not analysis.collapse(few).collapsed
    assert analysis.collapse(torch.randn(1, 2).repeat(64, 1)).collapsed
    two = 100.0 * torch.eye(2, 3)
    assert analysis.collapse(two).entropy_of_mean == pytest.approx(math.log(2) / math.log(3))
    for bad in (torch.randn(4), torch.randn(1, 4), torch.full((4, 4), torch.nan)):
        with pytest.raises(ValueError, match='outputs'):
            analysis.collapse(bad)


@pytest.mark.parametrize('dim', (64, 8192))
def test_collapse_of_embeddings(dim):
    x = nn.functional.normalize(torch.randn(64, dim), dim=1)
    healthy = analysis.collapse(x, temperature=None)
    assert not healthy.collapsed and healthy.spread > 0.9 and math.isnan(healthy.mean_entropy)
    assert analysis.collapse(x[:1] + 1e-4 * x, temperature=None).collapsed
    assert analysis.collapse(torch.linspace(-3, 3, 64)[:, None] * x[:1], temperature=None).collapsed


def test_health_names_the_token_that_collapsed(wrapped):
    x = torch.cat([zoo.images(wrapped.backbone) for _ in range(16)])
    out = wrapped.train()(x)
    before = {k: v.clone() for k, v in wrapped.state_dict().items()}
    healthy = analysis.health(wrapped, out)
    assert wrapped.training and all(torch.equal(v, before[k]) for k, v in wrapped.state_dict().items())
    assert list(healthy.spread) == list(healthy.top) == ['global', *TOKENS, 'ensemble']
    auxiliary = torch.cat([out.tokens.aux_cls, out.tokens.pooled], dim=1)
    for name, head, token in zip(TOKENS, wrapped.aux.heads, auxiliary.unbind(1)):
        projected = head(token)
        centered = projected - projected.mean(dim=0)
        assert healthy.spread[name] == pytest.approx((centered.norm() / projected.norm()).item(), rel=1e-4)
        given = wrapped.aux.global_head.last_layer(projected).argmax(dim=1)
        assert healthy.top[name] == given.bincount().max().item() / len(x)
    pooled = out.tokens.pooled.clone()
    pooled[:, 1] = pooled[:1, 1]
    dead = analysis.health(wrapped, out._replace(tokens=out.tokens._replace(pooled=pooled)))
    assert 'pooled 2' in dead.collapsed and dead.spread['pooled 2'] == pytest.approx(0, abs=1e-6)
    assert dead.top['pooled 2'] == 1 and healthy.spread['pooled 2'] > 0.01
    assert all(isinstance(v, float) for v in dead.floats().values()) and 'spread/pooled 2' in dead.floats()
    with pytest.raises(ValueError, match='two'):
        analysis.health(wrapped, wrapped(x[:1]))
    with torch.autocast('cpu', torch.bfloat16):
        mixed = wrapped(x)
    tokens = mixed.tokens._replace(pooled=mixed.tokens.pooled.bfloat16(), aux_cls=mixed.tokens.aux_cls.bfloat16())
    assert analysis.health(wrapped, mixed._replace(tokens=tokens)).spread.keys() == healthy.spread.keys()
    teacher = mte.make_teacher(wrapped)
    assert 'global' not in analysis.health(teacher, teacher(x)).spread


# --- plots


def test_each_has_a_plot(wrapped, drawn):
    loader = images_of(wrapped.backbone)
    tokens = analysis.collect(wrapped, loader)
    drawn(
        analysis.plot_accuracy(wrapped, loader, loader),
        analysis.plot_pair_nmi(tokens, wrapped, untrained=(tokens, wrapped)),
        analysis.plot_cka(tokens),
        analysis.plot_pooling(wrapped, loader[0][0]),
        analysis.plot_kernels(wrapped),
        analysis.plot_accuracy_by_class(tokens, tokens),
        analysis.plot_pair_accuracy(tokens, tokens),
        analysis.plot_pair_nmi(tokens, wrapped),
        analysis.plot_collapse([analysis.collapse(torch.randn(8, 4)) for _ in range(5)], every=100),
    )


def test_what_is_left_after_strip_is_the_global_token_whatever_the_loaders_order(wrapped):
    x = torch.cat([zoo.images(wrapped.backbone) + i for i in range(6)])
    data = TensorDataset(x, torch.arange(len(x)) % 3)
    figure = analysis.plot_accuracy(wrapped, *(DataLoader(data, 4, shuffle=True) for _ in range(2)))
    shown = {t.get_text() for t in figure.axes[0].get_yticklabels()}
    bars = [bar.get_width() for bar in figure.axes[0].patches]
    assert 'after strip' in shown and bars[0] == pytest.approx(bars[1])


def test_accuracy_of_other_backbones_and_of_batches_with_indices(drawn):
    batches = [(torch.randn(3, 3, 64, 64), torch.arange(3), torch.arange(3))]  # images, labels, indices
    model = pytest.importorskip('torchvision').models.resnet18(num_classes=4)
    drawn(analysis.plot_accuracy(mte.wrap(model, n_cls=0), batches, batches))
