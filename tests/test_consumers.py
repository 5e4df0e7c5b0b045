"""What people load timm models into takes the exports, and computes the same."""

import copy

import pytest
import timm
import torch
import zoo
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mte_timm as mte

pytestmark = pytest.mark.consumers
SIZES = {
    'plain': 32, 'resnet': 64, 'convnext': 64, 'swin': 64, 'eva02': 32, 'cait': 64, 'xcit': 64, 'naflex': 64,
}  # fmt: skip


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Name of a model in the zoo -> what was trained, without auxiliary tokens, and the folder of its export."""
    zoo.needs_local_dir()
    made = {}

    def export(name, num_classes=0):
        if (name, num_classes) not in made:
            wrapped = mte.wrap(zoo.build(name, num_classes=num_classes), **zoo.counts(name))
            args = {**zoo.ALL[name][1], 'num_classes': num_classes}
            folder = tmp_path_factory.mktemp(name) / 'export'
            mte.save_pretrained(wrapped, folder, model_args=args, img_size=SIZES[name])
            made[name, num_classes] = copy.deepcopy(mte.strip(wrapped)).eval(), folder
        return made[name, num_classes]

    return export


def load(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def images(name, count=2):
    return torch.randn(count, 3, SIZES[name], SIZES[name])


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('name', list(SIZES))
def test_timm_features_only(name, exported):
    model, folder = exported(name)
    x = images(name)
    indices = (-1,) if name == 'xcit' else (-2, -1)  # which has one block here
    loaded = load(folder, features_only=True, out_indices=indices)
    maps, expected = loaded(x), model.forward_intermediates(x, indices=indices, intermediates_only=True)
    for ours, theirs, channels in zip(maps, expected, loaded.feature_info.channels(), strict=True):
        ours = ours if ours.shape[1] == channels else ours.permute(0, 3, 1, 2)  # some hand out channels last
        close(ours, theirs)


@pytest.mark.parametrize('name', ['plain', 'resnet'])
def test_timm_validation_loop(name, exported):
    model, folder = exported(name, num_classes=5)
    loaded = load(folder)
    config = timm.data.resolve_model_data_config(loaded)
    assert config['input_size'] == (3, SIZES[name], SIZES[name])
    labels = torch.randint(5, (12,))
    dataset = TensorDataset(images(name, 12), labels)
    meters = timm.utils.AverageMeter(), timm.utils.AverageMeter()
    for network, meter in zip((model, loaded), meters):
        with torch.inference_mode():
            for x, y in DataLoader(dataset, 4):
                meter.update(timm.utils.accuracy(network(x), y)[0].item(), len(x))
    assert meters[0].avg == meters[1].avg and meters[0].count == 12


@pytest.mark.parametrize('name', list(SIZES))
def test_torch_export(name, exported):
    model, folder = exported(name)
    x = images(name)
    program = torch.export.export(load(folder), (x,))
    close(program.module()(x), model(x))


@pytest.mark.parametrize('name', ['plain', 'resnet', 'convnext'])
def test_torchscript(name, exported):
    model, folder = exported(name)
    x = images(name)
    close(torch.jit.script(load(folder, scriptable=True))(x), model(x))
    close(torch.jit.trace(load(folder), x)(x), model(x))


@pytest.mark.parametrize('name', ['plain', 'resnet', 'convnext', 'swin', 'cait', 'xcit', 'naflex'])
def test_onnx_runtime(name, exported, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model, folder = exported(name)
    x, file = images(name), tmp_path / 'model.onnx'
    torch.onnx.export(load(folder), (x,), file, input_names=['images'], dynamo=True)
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    [ours] = session.run(None, {'images': x.numpy()})
    close(torch.from_numpy(ours), model(x), 1e-4)


@pytest.mark.parametrize('name', ['plain', 'resnet', 'cait', 'xcit', 'naflex'])
def test_transformers(name, exported):
    transformers = pytest.importorskip('transformers')
    model, folder = exported(name)
    x = images(name)
    for kind in (transformers.AutoModel, transformers.TimmWrapperModel):
        out = kind.from_pretrained(folder).eval()(x)
        close(out.last_hidden_state, model.forward_features(x))
        close(out.pooler_output, model(x))
    classifier, folder = exported(name, num_classes=5)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    close(loaded(x).logits, classifier(x))


@pytest.mark.parametrize('name', ['resnet', 'convnext'])
def test_torchvision_detection(name, exported):
    torchvision = pytest.importorskip('torchvision')
    ops, detection = torchvision.ops, torchvision.models.detection

    class Pyramid(nn.Module):
        out_channels = 16

        def __init__(self, folder):
            super().__init__()
            self.body = load(folder, features_only=True, out_indices=(-2, -1))
            self.fpn = ops.FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

        def forward(self, x):
            return self.fpn({str(i): f for i, f in enumerate(self.body(x))})

    model, folder = exported(name)
    backbone = Pyramid(folder)
    detector = detection.FasterRCNN(
        backbone, num_classes=3, min_size=SIZES[name], max_size=SIZES[name],
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((8,), (16,)), ((1.0,),) * 2),
        box_roi_pool=ops.MultiScaleRoIAlign(['0', '1'], 3, 2),
    ).train()  # fmt: skip
    x = images(name)
    close(backbone.body.eval()(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
    target = {'boxes': torch.tensor([[4.0, 4.0, 40.0, 40.0]]), 'labels': torch.tensor([1])}
    losses = detector(list(x), [target, target])
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert all(p.grad is not None for p in backbone.body.parameters() if p.requires_grad)


@pytest.mark.parametrize('name', ['resnet', 'convnext'])
def test_segmentation_models_pytorch(name, exported):
    smp = pytest.importorskip('segmentation_models_pytorch')
    model, folder = exported(name)
    x = images(name)
    unet = smp.Unet(f'tu-local-dir:{folder}', decoder_channels=(32, 16, 8, 8, 4), encoder_weights='x').eval()
    close(unet.encoder(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
    assert unet(x).shape == (2, 1, *x.shape[2:])


def test_fastai(exported):
    vision = pytest.importorskip('fastai.vision.all')
    _, folder = exported('resnet')
    data = TensorDataset(images('resnet', 16), torch.arange(16) % 4)
    loaders = vision.DataLoaders(vision.DataLoader(data, bs=8), vision.DataLoader(data, bs=8))
    model = load(folder, num_classes=4)
    learner = vision.Learner(loaders, model, loss_func=nn.CrossEntropyLoss(), metrics=vision.accuracy)
    with learner.no_bar(), learner.no_logging():
        before = learner.validate()[0]
        learner.fit_one_cycle(5, 1e-2)
        assert learner.validate()[0] < before


def test_lightning(exported, tmp_path):
    lightning = pytest.importorskip('pytorch_lightning')
    _, folder = exported('plain')

    class Tuning(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.seen = load(folder, num_classes=4).train(), []

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    module = Tuning()
    trainer = lightning.Trainer(
        max_epochs=8, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(images('plain', 8), torch.arange(8) % 4), 8))
    assert module.seen[-1] < module.seen[0]


def test_peft_adapts_a_wrapped_model():
    peft = pytest.importorskip('peft')
    model = mte.wrap(zoo.build('plain', num_classes=4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=['qkv'], r=2, modules_to_save=['head']))
    for name, p in adapted.named_parameters():
        if 'backbone.' not in name:
            p.requires_grad_(True)
    x = images('plain', 4)
    loss = mte.MTECrossEntropy()(adapted(x), torch.arange(4))
    loss.backward()
    learning = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learning)
    torch.optim.SGD(learning, lr=0.1).step()
    expected = adapted.eval()(x).output.detach()
    plain = mte.strip(adapted.merge_and_unload())
    assert not any('lora' in name for name in plain.state_dict())
    close(plain(x), expected)
