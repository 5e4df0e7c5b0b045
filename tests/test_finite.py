"""What first gives NaN or infinity is named."""

import pytest
import torch
import zoo
from torch import nn

import mte_timm as mte


@pytest.mark.parametrize(
    ('part', 'named'),
    [
        ('backbone.blocks.1.mlp.fc1', r'backbone\.blocks\.1\.mlp\.fc1 \(Linear\)'),
        ('aux.ten.kv', r'MTE: aux\.ten(\.\w+)? \('),
        ('aux.pool.pw.0', r'MTE: aux.pool'),
        ('aux.heads', r'aux\.heads'),
    ],
)
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_the_part_is_named(part, named, value):
    model, x = mte.wrap(zoo.build('plain'), head=lambda dim: nn.Linear(dim, 8)), zoo.images(zoo.build('plain'))
    with mte.check_finite(model):
        model(x)
    parameters = dict(model.named_parameters())
    name = next(n for n in parameters if n.startswith(part))
    parameters[name].data.fill_(value)
    with pytest.raises(FloatingPointError, match=named), mte.check_finite(model):
        model(x)
    assert not any(m._forward_hooks for m in model.modules() if m is not model.backbone)


def test_a_loss_is_named_and_so_is_a_gradient():
    model = mte.wrap(zoo.build('plain'))
    x = zoo.images(model.backbone)
    loss_fn = mte.MTELoss(lambda s, t: (s - t).square().mean() / 0)
    with pytest.raises(FloatingPointError, match='MTELoss gives NaN or infinity'), mte.check_finite(model, loss_fn):
        loss_fn(model(x), model(x * 2))

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self):
            return self.weight.sqrt().sum()  # finite, of infinite slope

    root = Root()
    with pytest.raises(FloatingPointError, match='gradient of weight has'), mte.check_finite(root, gradients=True):
        root().backward()
    with mte.check_finite(root):
        root().backward()


def test_inputs_that_are_not_finite_are_said():
    model = mte.wrap(zoo.build('plain'))
    with pytest.raises(FloatingPointError, match='inputs have it already'), mte.check_finite(model):
        model(torch.full((1, 3, 32, 32), float('nan')))


@pytest.mark.parametrize('name', ['aux.cls_tokens', 'backbone.cls_token', 'backbone.pos_embed'])
def test_tokens_are_named(name):
    model = mte.wrap(zoo.build('plain'))
    model.get_parameter(name).data[0, 1 if name == 'aux.cls_tokens' else 0, 3] = float('nan')
    with (
        pytest.raises(FloatingPointError, match=rf'MTE: {name} has NaN or infinity \(1 and 0'),
        mte.check_finite(model),
    ):
        model(zoo.images(model.backbone))


def test_student_and_teacher_are_told_apart():
    student = mte.wrap(zoo.build('plain'))
    teacher = mte.make_teacher(student)
    teacher.backbone.blocks[0].mlp.fc1.weight.data[0, 0] = float('inf')
    x = zoo.images(student.backbone)
    with pytest.raises(FloatingPointError, match=r'MTE \(argument 2\): backbone'), mte.check_finite(student, teacher):
        student(x), teacher(x)


def test_functions_are_refused():
    with (
        pytest.raises(TypeError, match=r'not a function; .*MTELoss'),
        mte.check_finite(nn.Linear(2, 2), nn.functional.mse_loss),
    ):
        pass
