"""Checkpoints of many codebases, made by their own classes: what strip makes of each (docs/checkpoints.md).

Rows of other repositories need MTE_UPSTREAM, a folder with clones: make test-layouts UPSTREAM=FOLDER records them all.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from upstream_layouts import BEGIN, CLONES, END
from upstream_layouts import REFUSED as OF_CLONES
from zoo import network, prefixed, randomized

import mte_timm as mte

UPSTREAM = os.environ.get('MTE_UPSTREAM')
VIT, SMALL = 'vit_tiny_patch16_224', dict(embed_dim=48, depth=4, num_heads=3)


def vit(img_size=64):
    return network(VIT, img_size=img_size, **SMALL)


def resnet():
    model = randomized(torchvision.models.resnet18())
    model.fc = nn.Identity()
    return model


def of_vit(content, **kwargs):
    """A row whose network is a timm ViT: content of the file, model, timm's name, arguments."""

    def make():
        net = vit()
        return content(net), net, VIT, {**SMALL, **kwargs}

    return make


def lightly_masked(net):
    modules = pytest.importorskip('lightly.models.modules')
    return {'state_dict': prefixed(modules.MaskedVisionTransformerTIMM(net).state_dict(), 'student_backbone.')}


def distributed(net):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        return {'model': torch.compile(DistributedDataParallel(net)).state_dict()}
    finally:
        torch.distributed.destroy_process_group()


def part_by_part(net):
    names = (k.replace('blocks.1.', 'blocks.1._checkpoint_wrapped_module.') for k in net.state_dict())
    names = (k.replace('attn.', '_fsdp_wrapped_module.attn.') for k in names)
    return {'state_dict': dict(zip(prefixed(dict.fromkeys(names), 'backbone.module.'), net.state_dict().values()))}


def timm_training(net):
    ema = timm.utils.ModelEmaV3(net)
    args = argparse.Namespace(img_size=64, input_size=None, mean=None, std=None, crop_pct=None)
    student = {k: v * 2 for k, v in net.state_dict().items()}
    return {'arch': VIT, 'state_dict': student, 'state_dict_ema': ema.module.state_dict(), 'args': args}


def lightning_average(net):
    pl = pytest.importorskip('pytorch_lightning')
    averaging = pytest.importorskip('pytorch_lightning.callbacks.weight_averaging')

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = net

        def training_step(self, batch, _):
            return 0.0 * self.backbone(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    out = Path(os.environ['PYTEST_TMP'])
    trainer = pl.Trainer(
        max_steps=2, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=out, callbacks=averaging.WeightAveraging(),
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(4, 3, 64, 64), batch_size=2))
    trainer.save_checkpoint(out / 'lightning.ckpt')
    saved = torch.load(out / 'lightning.ckpt', weights_only=False)
    assert 'current_model_state' in saved
    return saved


def lora(merge):
    def content(net):
        peft = pytest.importorskip('peft')
        model = peft.get_peft_model(net, peft.LoraConfig(target_modules=['qkv'], r=2))
        if not merge:
            return model.state_dict()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if 'lora_B' in name:
                    p.normal_(0, 0.1)
        return model.merge_and_unload().state_dict()

    return content


def wrapped(shape):
    def make():
        model = mte.wrap(vit(img_size=shape))
        return {'student': {}, 'teacher': model.state_dict()}, model.backbone, VIT, SMALL

    return make


def sequential():
    net = resnet()
    backbone = nn.Sequential(*list(net.children())[:-1])
    return {'state_dict': prefixed(backbone.state_dict(), 'backbone.')}, net, 'resnet18', {}


def uncounted():
    net = resnet()
    return {k: v for k, v in net.state_dict().items() if 'num_batches' not in k}, net, 'resnet18', {}


def moco_v2():
    net = resnet()
    own = prefixed(net.state_dict(), 'module.encoder_q.')
    other = {k.replace('encoder_q', 'encoder_k'): v * 2 if v.is_floating_point() else v for k, v in own.items()}
    queue = {'module.queue': torch.randn(8, 16), 'module.queue_ptr': torch.zeros(1, dtype=torch.long)}
    head = {'module.encoder_q.fc.0.weight': torch.randn(4, 4)}
    return {'arch': 'resnet18', 'state_dict': own | other | queue | head, 'optimizer': {}}, net, 'resnet18', {}


def self_of(name, **kwargs):
    def make():
        net = network(name, **kwargs)
        return {'model': net.state_dict()}, net, name, kwargs

    return make


LOCAL = {
    'timm state dict: VisionTransformer': of_vit(lambda net: net.state_dict()),
    'timm train.py with EMA: ModelEmaV3': of_vit(timm_training),
    'timm Swin': self_of('swin_tiny_patch4_window7_224', **zoo.ALL['swin'][1]),
    'timm BEiT': self_of('beit_base_patch16_224', img_size=64, **SMALL),
    'timm EVA-02': self_of('eva02_tiny_patch14_224', img_size=56, **SMALL),
    'timm ConvNeXt': self_of('convnext_atto', **zoo.ALL['convnext'][1]),
    'mte.wrap, square images': wrapped(64),
    'mte.wrap, images of 32x128': wrapped((32, 128)),
    'DataParallel': of_vit(lambda net: {'model': nn.DataParallel(net).state_dict()}),
    'torch.compile of DistributedDataParallel': of_vit(distributed),
    'FSDP and checkpointing of single parts': of_vit(part_by_part),
    'torch AveragedModel': of_vit(lambda net: {'state_dict': AveragedModel(net).state_dict()}),
    'Lightning WeightAveraging': of_vit(lightning_average),
    'lightly MaskedVisionTransformerTIMM': of_vit(lightly_masked),
    'lightly: Sequential of torchvision ResNet': sequential,
    'MoCo v2 layout of torchvision ResNet': moco_v2,
    'torchvision ResNet without num_batches_tracked': uncounted,
    'seven keys deep': of_vit(lambda net: {'a': {'b': {'c': {'d': {'e': {'f': {'model': net.state_dict()}}}}}}}),
    'peft LoRA, merged': of_vit(lora(True)),
    'peft LoRA, not merged': of_vit(lora(False)),
    'a whole pickled model, not trusted': of_vit(lambda net: net),
    'a whole pickled model, trusted': of_vit(lambda net: net, trust=True),
}  # fmt: skip
REFUSED = {'peft LoRA, not merged': 'merge them first', 'a whole pickled model, not trusted': 'trust'} | OF_CLONES


@pytest.fixture
def row(tmp_path, record_property, monkeypatch):
    """Strips a file and holds it to the model that it was made of, or to the reason for which it is refused."""
    monkeypatch.setenv('PYTEST_TMP', str(tmp_path))

    def check(name, content, forward, architecture, kwargs, size=(64, 64), tolerance=0.0):
        path = tmp_path / 'c.pth'
        torch.save(content, path)
        reason = REFUSED.get(name)
        try:
            report = mte.strip_checkpoint(path, architecture, **kwargs)
        except mte.CheckpointError as e:
            assert reason is not None and reason in str(e), e
            record_property('layout', [name, architecture, None, str(e).removeprefix(f'{path}: ').split('. ')[0]])
            return
        assert reason is None, f'accepted: {report}'
        torch.manual_seed(1)
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            gap = (report.model(x) - forward(x)).abs().max().item()
        record_property('layout', [name, architecture, gap, report.key])
        assert gap <= tolerance

    return check


@pytest.mark.parametrize('name', LOCAL)
def test_a_layout_of_an_installed_package(name, row):
    content, net, architecture, kwargs = LOCAL[name]()
    size = {'mte.wrap, images of 32x128': (32, 128), 'timm EVA-02': (56, 56)}.get(name, (64, 64))
    row(name, content, net.eval(), architecture, kwargs, size, tolerance=1e-6 if 'EVA' in name else 0.0)


@pytest.mark.upstream
@pytest.mark.skipif(not UPSTREAM, reason='MTE_UPSTREAM names no folder with clones')
@pytest.mark.parametrize('name', CLONES)
def test_a_layout_of_another_repository(name, row, tmp_path):
    repository, code, architecture, kwargs, size, tolerance = CLONES[name]
    folder = Path(UPSTREAM) / repository
    if not folder.is_dir():
        pytest.skip(f'{UPSTREAM} has no {repository}')
    script = tmp_path / 'make.py'
    script.write_text(BEGIN + code + END.format(size=size))
    env = {**os.environ, 'PYTHONPATH': f'{folder}:{Path(mte.__file__).parents[1]}'}
    command = [sys.executable, '-W', 'ignore', script]
    made = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    content, out = (torch.load(tmp_path / f'{n}.pth', weights_only=True) for n in ('content', 'out'))
    row(name, content, lambda x: out, architecture, kwargs, (size, size), tolerance)
