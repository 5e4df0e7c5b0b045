"""The losses are the paper's, and the criterion's state advances once a step."""

import copy
import functools
import math
from collections import Counter, OrderedDict, deque
from types import ModuleType
from typing import Any
from unittest.mock import Mock, call

import lookalikes as like
import pytest
import timm.loss
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zoo
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.testing import assert_close

import mte_timm as mte


def output(batch=4, dim=6):
    """An MTEOutput of random numbers."""
    return mte.MTEOutput(*(torch.randn(batch, dim, requires_grad=True) for _ in range(2)), None)


def product(s, t):
    return (s * t).sum()


class DINO(like.CentredLoss):
    """Its center is a moving average."""

    def __init__(self):
        super().__init__(6, 2)

    def forward(self, student, teacher, epoch=0):
        return super().forward(student, teacher, epoch)


class QueueLoss(nn.Module):
    """As MoCo's: negatives from a queue that is written in place, with its pointer in a buffer."""

    def __init__(self, dim=6, size=8):
        super().__init__()
        self.register_buffer('queue', torch.randn(dim, size))
        self.register_buffer('pointer', torch.zeros(1, dtype=torch.long))

    def forward(self, q, k):
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ self.queue.clone()], dim=1)
        at, n = int(self.pointer), len(k)
        self.queue[:, at : at + n] = k.T.detach()
        self.pointer[0] = (at + n) % self.queue.shape[1]
        return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))


class PlainStateLoss(nn.Module):
    """State that is in no buffer: a number, a tensor written in place, a deque."""

    def __init__(self):
        super().__init__()
        self.steps, self.mean, self.history = 0, torch.zeros(6), deque(maxlen=3)

    def forward(self, s, t):
        self.steps += 1
        self.mean += t.detach().mean(dim=0)
        self.history.append(self.steps)
        return F.mse_loss(s, t + self.mean)


class FrozenParameterLoss(PlainStateLoss):
    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.nested = {'centers': [torch.zeros(6)]}

    def forward(self, s, t):
        self.center.data.add_(t.detach().mean(dim=0))
        self.nested['centers'][0].add_(1)
        return super().forward(s, t) + self.center.sum() + self.nested['centers'][0].sum()


@pytest.mark.parametrize('weight', [0.0, 0.5, 1.0])
def test_loss_is_the_mean_of_ensemble_and_distillation(weight):
    student, teacher = output(), output()
    loss = mte.MTELoss(F.mse_loss, weight=weight)(student, teacher)
    expected = F.mse_loss(student.aux, teacher.aux) + weight * F.mse_loss(student.output, teacher.aux)
    assert_close(loss, expected / (1 + weight))


@pytest.mark.parametrize('make', [DINO, QueueLoss, PlainStateLoss, FrozenParameterLoss])
def test_state_advances_once_as_in_the_hosts_own_update(make):
    criterion = make()
    host, loss_fn = copy.deepcopy(criterion), mte.MTELoss(criterion)
    for _ in range(3):
        student, teacher, before = output(), output(), copy.deepcopy(host)
        loss = loss_fn(student, teacher)
        expected = (host(student.aux, teacher.aux) + before(student.output, teacher.aux)) / 2  # both see one state
        assert_close(loss, expected)
        own, theirs = ({**c.state_dict(), **vars(c)} for c in (criterion, host))
        for name in (n for n in theirs if not n.startswith('_')):
            assert str(own[name]) == str(theirs[name]), name
            assert not isinstance(theirs[name], torch.Tensor) or torch.equal(own[name], theirs[name]), name


@pytest.mark.parametrize('wrapper', ['object', 'method', 'partial'])
def test_state_behind_any_callable_advances_once(wrapper):
    class Callable:
        steps = 0

        def __call__(self, s, t):
            self.steps += 1
            return F.mse_loss(s, t) * self.steps

    owner = Callable() if wrapper == 'object' else PlainStateLoss()
    criterion = {'object': owner, 'method': getattr(owner, 'forward', None), 'partial': functools.partial(owner)}
    mte.MTELoss(criterion[wrapper])(output(), output())
    assert owner.steps == 1


class Counting(nn.Module):
    """Counts its calls in ``state``."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, s, t):
        return F.mse_loss(s, t) * add(self.state)


class Steps:
    def __init__(self):
        self.steps = 0


class AttributeDict(dict):
    """As EasyDict, whose update takes no pairs."""

    def update(self, other):
        super().update(other.items())


@pytest.mark.parametrize('kind', [Counter, dict, AttributeDict])
def test_both_losses_see_the_same_counts(kind):
    counts, seen = kind({'a': 3, 'b': 5}), []
    loss = mte.MTELoss(Weighted(counts, seen.append))
    loss(output(), output())
    assert seen == [8, 8] and counts == {'a': 4, 'b': 5}


class Weighted(nn.Module):
    def __init__(self, counts, see):
        super().__init__()
        self.counts, self.see = counts, see

    def forward(self, s, t):
        self.see(sum(self.counts.values()))
        self.counts['a'] += 1
        return F.mse_loss(s, t)


def test_attributes_are_not_taken_for_variables_of_the_script(monkeypatch):
    data, seen = [object()], []
    monkeypatch.setitem(globals(), 'data', data)
    see = seen.append  # what a list got in L_dist would be taken back

    def criterion(s, t):
        see(globals()['data'])
        return F.mse_loss(s, t.data)

    mte.MTELoss(criterion)(output(), output())
    assert len(seen) == 2 and all(s is data for s in seen)


GLOBAL: Any = None
IMPORTED: Any = None


def of_the_script(s, t):
    return GLOBAL(s, t)


def apply(criterion, s, t):
    return criterion(s, t)


def add(state):
    if isinstance(state, (dict, Steps)):
        state = state if isinstance(state, dict) else vars(state)
        state['steps'] = state.get('steps', 0) + 1
        return state['steps']
    return state[0].add_(1).item()


@pytest.mark.parametrize('kind', [OrderedDict, Counter, dict, Steps, lambda: (torch.zeros(1),)])
@pytest.mark.parametrize('holder', ['none', 'object', 'method', 'argument', 'default', 'closure', 'global', 'generator',
                                    'imported', 'called', 'helper'])  # fmt: skip
def test_state_of_any_kind_and_in_any_place_advances_once(kind, holder, monkeypatch):
    """In what the criterion holds, whatever holds the criterion."""

    class Trainer:
        def __init__(self):
            self.parts = [criterion]

        def loss(self, s, t):
            return self.parts[0](s, t)

        __call__ = loss

    criterion = Counting(kind())
    held = {
        'none': criterion,
        'object': Trainer(),
        'method': Trainer().loss,
        'argument': functools.partial(lambda c, s, t: c(s, t), criterion),
        'closure': lambda s, t: criterion(s, t),
        'global': of_the_script,
        'generator': lambda s, t: sum(GLOBAL(*pair) for pair in [(s, t)]),
        'imported': lambda s, t: IMPORTED.part(s, t),
        'called': type('Holder', (), {'__call__': lambda self, s, t: GLOBAL(s, t)})(),
        'default': lambda s, t, part=criterion: part(s, t),
        'helper': functools.wraps(of_the_script)(lambda *outputs: of_the_script(*outputs)),
    }
    imported = ModuleType('of_the_user')
    imported.part = criterion
    monkeypatch.setitem(globals(), 'GLOBAL', criterion)
    monkeypatch.setitem(globals(), 'IMPORTED', imported)
    mte.MTELoss(held[holder])(output(), output())
    assert add(criterion.state) == 2


def test_variables_of_functions_and_further_criteria_are_state(monkeypatch):
    monkeypatch.setitem(globals(), 'GLOBAL', torch.zeros(6))
    center, steps, registry, further = torch.zeros(6), 0, {'center': torch.zeros(6)}, Centering()

    def criterion(s, t, other):
        global GLOBAL
        nonlocal steps
        GLOBAL = GLOBAL + t.mean(0).detach()
        steps += 1
        center.add_(t.mean(0).detach())
        registry['center'] += t.mean(0).detach()
        return F.mse_loss(s, t + center + GLOBAL) + other(s, t)

    called = Centering()
    loss = mte.MTELoss(criterion, call=lambda loss, s, t, other: loss(s, t, other) + called(s, t))
    student, teacher = output(), output()
    value = loss(student, teacher, further)
    mean = teacher.aux.mean(0)
    for each in (center, GLOBAL, registry['center'], further.center, called.center):
        assert_close(each, mean.detach())
    assert steps == 1
    plain = [F.mse_loss(o, teacher.aux + 2 * mean) + 2 * F.mse_loss(o, teacher.aux + mean) for o in student[:2]]
    assert_close(value, sum(plain) / 2)


def test_a_loss_of_functions_is_copied_and_saved(tmp_path):
    loss = copy.deepcopy(mte.MTELoss(of_the_script, call=apply))
    torch.save(loss, tmp_path / 'loss.pt')
    loaded = torch.load(tmp_path / 'loss.pt', weights_only=False)
    assert loaded.criterion is of_the_script and loaded._used == loss._used


def test_a_scripted_module_with_state_and_outputs_in_the_wrong_order_are_refused():
    student, teacher = output(), output()
    with pytest.raises(TypeError, match='scripted'):
        mte.MTELoss(torch.jit.script(nn.BatchNorm1d(6)), call=lambda norm, s, t: norm(s).sum())(student, teacher)
    with pytest.raises(ValueError, match="student: this is a teacher's"):
        mte.MTELoss(nn.MSELoss())(teacher._replace(output=teacher.aux), student)


class Centering(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('center', torch.zeros(6))

    def forward(self, s, t):
        self.center += t.mean(0).detach()
        return F.mse_loss(s, t + self.center)


@pytest.mark.parametrize('how', ['module', 'closure', 'partial'])
def test_the_state_of_a_compiled_loss_advances_once(how):
    criterion = Centering()
    loss = mte.MTELoss(
        {
            'module': criterion,
            'closure': lambda s, t: criterion(s, t),
            'partial': functools.partial(F.mse_loss, reduction='sum'),
        }[how]
    )
    student, teacher = output(), output()
    expected = copy.deepcopy(loss) if how != 'closure' else mte.MTELoss(copy.deepcopy(criterion))
    whole = torch.__version__ >= '2.7'  # older dynamo does not trace context managers, and makes several graphs
    compiled = torch.compile(lambda s, t: loss(s, t), backend='eager', fullgraph=whole)
    assert_close(compiled(student, teacher), expected(student, teacher))
    assert how == 'partial' or torch.equal(criterion.center, teacher.aux.mean(0))


@pytest.mark.skipif(not dist.is_available(), reason='torch was built without torch.distributed')
def test_a_reduction_under_way_is_waited_for():
    """As DINOv2's: the center is reduced while the network runs, and waited for in the next call."""

    class Reduction(dist.Work):
        def __init__(self, center):
            super().__init__()
            self.center, self.done = center, False

        def wait(self, timeout=None):
            if not self.done:
                self.center += 1
            self.done = True
            return True

    class Reducing(nn.Module):
        def __init__(self):
            super().__init__()
            self.center = torch.zeros(6)
            self.handle = Reduction(self.center)

        def forward(self, s, t):
            self.handle.wait()
            return F.mse_loss(s, t + self.center)

    student, teacher = output(), output()
    expected = mte.MTELoss(lambda s, t: F.mse_loss(s, t + 1))(student, teacher)
    assert_close(mte.MTELoss(Reducing())(student, teacher), expected)


def test_a_criterion_that_writes_into_its_arguments_is_given_its_own():
    student, teacher = output(), output()
    expected = mte.MTELoss(lambda s, t: F.mse_loss(s, t / 0.5))(student, teacher)
    with torch.no_grad():
        assert_close(mte.MTELoss(lambda s, t: F.mse_loss(s, t.div_(0.5)))(student, teacher), expected)


def test_state_is_put_back_when_the_criterion_fails():
    class Fails(DINO):
        def forward(self, s, t):
            super().forward(s, t)
            raise RuntimeError('no')

    criterion = Fails()
    with pytest.raises(RuntimeError, match='no'):
        mte.MTELoss(criterion)(output(), output())
    assert not criterion.center.any()


class Learning(nn.Module):
    """Learns, in places that are no parameters of its own, and keeps a log."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.listed = [self.scale]
        self.plain = torch.tensor(3.0, requires_grad=True)
        self.log = {}

    def forward(self, s, t):
        self.log['loss'] = loss = F.mse_loss(s, t) * self.listed[0] * self.plain
        return loss


def test_what_a_criterion_learns_gets_the_gradient_of_both_streams():
    criterion = Learning()
    loss_fn = mte.MTELoss(criterion)
    for _ in range(2):  # its log holds a tensor with a graph from the first step on
        student, teacher = output(), output()
        loss = loss_fn(student, teacher)
    loss.backward()
    mean = (F.mse_loss(student.aux, teacher.aux) + F.mse_loss(student.output, teacher.aux)).detach() / 2
    assert_close(criterion.scale.grad, 3 * mean)
    assert_close(criterion.plain.grad, 2 * mean)


def test_distillation_gives_no_gradient_to_its_teacher():
    student, teacher = output(), output()
    mte.MTELoss(product)(student, teacher).backward()
    assert_close(teacher.aux.grad, student.aux / 2)
    assert teacher.output.grad is None


def test_arguments_go_on_and_their_order_can_be_adapted():
    student, teacher = output(), output()
    assert_close(mte.MTELoss(DINO())(student, teacher, 3), mte.MTELoss(DINO())(student, teacher, epoch=3))
    calls = Mock()  # a list would be state

    def teacher_first(teacher_views, student_views):
        calls(len(teacher_views), len(student_views))
        return teacher_views[0].sum() - student_views[0].sum()

    mte.MTELoss(teacher_first, call=lambda loss, s, t: loss(t.chunk(2), s.chunk(4)))(student, teacher)
    assert calls.call_args_list == [call(2, 4), call(2, 4)]


def test_dicts_and_tuples_are_combined_entry_by_entry():
    student, teacher = output(), output()
    criterion = mte.MTELoss(lambda s, t: {'l': product(s, t), 'of': (s.sum(), t.sum()), 'name': 'mine'}, weight=2.0)
    out = criterion(student, teacher)
    assert_close(out['l'], ((student.aux + 2 * student.output) * teacher.aux).sum() / 3)
    assert_close(out['of'][0], (student.aux.sum() + 2 * student.output.sum()) / 3)
    assert isinstance(out['of'], tuple) and out['name'] == 'mine'


def test_the_parts_of_the_last_loss_are_plain_floats():
    student, teacher, loss = output(), output(), mte.MTELoss(nn.MSELoss(), weight=3.0)
    assert loss.parts == {}
    total = loss(student, teacher)
    ensemble, distilled = (F.mse_loss(s, teacher.aux).item() for s in (student.aux, student.output))
    assert loss.parts == pytest.approx({'ensemble': ensemble, 'distillation': distilled})
    assert total.item() == pytest.approx((ensemble + 3 * distilled) / 4)
    several = mte.MTELoss(lambda s, t: {'near': (s - t).abs().mean(), 'far': [(s + t).mean(), 1.0]})
    several(student, teacher)
    assert list(several.parts) == [f'{p} {n}' for p in ('ensemble', 'distillation') for n in ('near', 'far 0', 'far 1')]
    supervised, labels = mte.MTECrossEntropy(), torch.tensor([0, 1, 2, 0])
    supervised(student, labels)
    assert supervised.parts['ensemble'] == pytest.approx(F.cross_entropy(student.aux, labels).item())
    copy.deepcopy(loss)


@pytest.mark.parametrize('soft', [False, True])
def test_supervised_loss_is_the_papers(soft):
    out = output(dim=5)
    target = torch.rand(4, 5).softmax(dim=-1) if soft else torch.randint(5, (4,))
    loss = mte.MTECrossEntropy()(out, target)
    hard = target if soft else F.one_hot(target, 5).float()
    ensemble = -(hard * out.aux.log_softmax(dim=-1)).sum(dim=-1).mean()
    distill = -(out.aux.detach().softmax(dim=-1) * out.output.log_softmax(dim=-1)).sum(dim=-1).mean()
    assert_close(loss, (ensemble + distill) / 2)
    assert_close(torch.autograd.grad(loss, out.aux), torch.autograd.grad(ensemble / 2, out.aux))
    if soft:
        assert_close(mte.MTECrossEntropy(SoftTargetCrossEntropy())(out, target), loss)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_distillation_is_of_the_criterions_kind_and_scale(reduction):
    out, target = output(dim=5), torch.rand(4, 5)
    of_ensemble, of_global = out.aux, out.output

    def binary(logits, target):
        each = -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log())
        return getattr(each, reduction)()

    ensemble = of_ensemble.detach()
    expected = (binary(of_ensemble, target) + binary(of_global, ensemble.sigmoid())) / 2
    criteria = nn.BCEWithLogitsLoss(reduction=reduction), BinaryCrossEntropy(smoothing=0, reduction=reduction)
    for criterion in criteria:
        assert_close(mte.MTECrossEntropy(criterion)(out, target), expected)
    if hasattr(criteria[1], 'sum_classes') and reduction == 'mean':
        summed = BinaryCrossEntropy(smoothing=0, sum_classes=True)
        assert_close(mte.MTECrossEntropy(summed)(out, target), 5 * expected)
    multiclass = nn.CrossEntropyLoss(reduction=reduction)
    expected = (multiclass(of_ensemble, target) + multiclass(of_global, ensemble.softmax(dim=-1))) / 2
    assert_close(mte.MTECrossEntropy(multiclass)(out, target), expected)


@pytest.mark.parametrize('name', ['AsymmetricLossMultiLabel', 'PolyBinaryCrossEntropy', 'ZlprLoss'])
def test_timms_losses_of_several_labels_are_distilled_label_by_label(name):
    if not hasattr(timm.loss, name):
        pytest.skip(f'this timm has no {name}')
    out, target = output(dim=5), (torch.rand(4, 5) < 0.5).float()
    loss = mte.MTECrossEntropy(getattr(timm.loss, name)())
    loss(out, target)
    each = F.binary_cross_entropy_with_logits(out.output, out.aux.sigmoid(), reduction='none')
    reduction = vars(loss.criterion).get('reduction', 'sum' if name.startswith('Asymmetric') else 'mean')
    expected = {'batchmean': each.sum(dim=1).mean(), 'mean': each.mean(), 'sum': each.sum()}[reduction]
    assert loss.parts['distillation'] == pytest.approx(expected.item())


def test_an_unknown_criterion_must_say_whether_classes_are_apart():
    out, target = output(dim=5), torch.rand(4, 5)
    known = mte.MTECrossEntropy(nn.BCEWithLogitsLoss())(out, target)
    own = {
        'function': F.binary_cross_entropy_with_logits,
        'margin': nn.MultiLabelSoftMarginLoss(),
        'said': lambda x, y: F.binary_cross_entropy_with_logits(x, y),
    }
    for name, criterion in own.items():
        assert_close(mte.MTECrossEntropy(criterion, binary=True if name == 'said' else None)(out, target), known)
    with pytest.raises(ValueError, match='binary=True'):
        mte.MTECrossEntropy(own['said'])(out, target)
    single = output(dim=1)  # whose softmax is 1, whatever it is
    for criterion in (lambda x, y: F.binary_cross_entropy_with_logits(x.squeeze(1), y), nn.CrossEntropyLoss()):
        with pytest.raises(ValueError, match=r'softmax of one logit.*binary=True'):
            mte.MTECrossEntropy(criterion)(single, torch.rand(4))
    labels = torch.randint(5, (4,))
    assert_close(
        mte.MTECrossEntropy(lambda x, y: F.cross_entropy(x, y))(out, labels), mte.MTECrossEntropy()(out, labels)
    )


@pytest.mark.parametrize('loss', (mte.MTELoss, mte.MTECrossEntropy))
def test_bad_criteria_and_weights_are_named(loss):
    for weight in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f'weight={weight}'):
            loss(F.mse_loss, weight=weight)
    with pytest.raises(TypeError, match='criterion'):
        loss(None if loss is mte.MTELoss else 'x')


@pytest.mark.parametrize('returned', [Steps, lambda: {'epoch': 3}])
def test_a_criterion_that_returns_nothing_to_combine_is_named(returned):
    with pytest.raises(TypeError, match='tensors'):
        mte.MTELoss(lambda s, t: returned())(output(), output())


def test_bad_outputs_are_named():
    with pytest.raises(TypeError, match='teacher'):
        mte.MTELoss(F.mse_loss)(output(), torch.randn(4, 6))
    with pytest.raises(TypeError, match='output'):
        mte.MTECrossEntropy()(torch.randn(4, 6), torch.zeros(4))
    for x in (torch.randn(2, 3, 32, 32), [torch.randn(1, 3, 32, 32)] * 2):
        with pytest.raises(ValueError, match='no classifier'):
            mte.MTECrossEntropy()(mte.wrap(zoo.build('plain'))(x), torch.zeros(2, dtype=torch.long))
    distilled = mte.MTEOutput((torch.randn(4, 6), torch.randn(4, 6)), torch.randn(4, 6), None)
    with pytest.raises(ValueError, match='set_distilled_training'):
        mte.MTECrossEntropy()(distilled, torch.zeros(4))


@pytest.mark.parametrize('name', ['plain', 'eva02', 'swin'])
def test_training_lowers_the_loss(name):
    wrapped = mte.wrap(zoo.build(name, num_classes=3), **zoo.counts(name)).train()
    x, y = zoo.images(wrapped.backbone, 6), torch.arange(6) % 3
    loss_fn, losses = mte.MTECrossEntropy(), []
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=3e-3)
    for _ in range(25):
        loss = loss_fn(wrapped(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
