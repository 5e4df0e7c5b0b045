"""Exported backbones on other tasks: benchmarks/transfer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.layers import LayerNorm2d
from torchvision.models.detection import MaskRCNN

import mte_timm as mte

pytest.importorskip('segmentation_models_pytorch')
pytest.importorskip('torchmetrics')
pytest.importorskip('pycocotools')

from benchmarks import images
from benchmarks.transfer import __main__ as command
from benchmarks.transfer import detect, segment
from benchmarks.transfer.backbone import STRIDES, Maps, load
from benchmarks.transfer.detect import Boxed, make_detector, open_boxed
from benchmarks.transfer.report import table
from benchmarks.transfer.segment import IGNORED, Masked, Segmenter, open_masked
from benchmarks.transfer.training import Recipe, fit
from benchmarks.transfer.voc import to_coco

SIZE = (48, 64)  # of pictures, and what the export is made for


@pytest.fixture(scope='module')
def export(tmp_path_factory) -> str:
    model = mte.wrap('test_vit', num_classes=0, img_size=SIZE, dynamic_img_size=True)
    return str(mte.save_pretrained(model, tmp_path_factory.mktemp('weights') / 'vit-mte-seed0'))


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture
def labeled(tmp_path) -> Path:
    for split in ('train', 'val'):
        for i in range(8):
            picture(tmp_path / 'labeled' / split / f'class{i % 2}' / f'{i}.png', i)
    return tmp_path / 'labeled'


@pytest.fixture
def masked(tmp_path) -> Path:
    """Classes 1, 4 and 9 in stripes; 255 is none."""
    values = np.full(SIZE, 255)
    values[:, :20], values[:, 20:40], values[:20, 40:] = 1, 4, 9
    for split in ('train', 'val'):
        for i in range(4):
            picture(tmp_path / 'masked' / 'images' / split / f'{i}.png', i)
            mask(tmp_path / 'masked' / 'masks' / split / f'{i}.png', values)
    return tmp_path / 'masked'


def coco(root: Path, annotations: list[dict], pictures: int = 4, masks: bool = False) -> Path:
    for split in ('train', 'val'):
        for i in range(pictures):
            picture(root / f'{split}2017' / f'{i}.png', i)
        images = [{'id': i, 'file_name': f'{i}.png', 'height': SIZE[0], 'width': SIZE[1]} for i in range(pictures)]
        categories = [{'id': 3, 'name': 'cell'}, {'id': 7, 'name': 'plate'}]
        (root / 'annotations').mkdir(exist_ok=True)
        content = {'images': images, 'categories': categories, 'annotations': [*map(complete, annotations)]}
        if not masks:
            for a in content['annotations']:
                del a['segmentation']
        (root / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(content))
    return root


def complete(annotation: dict) -> dict:
    x, y, w, h = annotation['bbox']
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {'area': w * h, 'segmentation': polygon, 'category_id': 3, **annotation}


BOXES = [
    {'id': 1, 'image_id': 0, 'bbox': [4, 4, 20, 16]},
    {'id': 2, 'image_id': 0, 'bbox': [30, 8, 24, 30], 'category_id': 7},
    {'id': 3, 'image_id': 1, 'bbox': [0, 0, 64, 48]},
    {'id': 4, 'image_id': 2, 'bbox': [10, 10, 20, 20]},
]  # image 3 has none


def voc(root: Path, objects: str, test_objects: str = '') -> Path:
    for split, name, content in (('trainval', 'a', objects), ('test', 'b', test_objects or objects)):
        picture(root / 'JPEGImages' / f'{name}.png', 0)
        for folder in ('Annotations', 'ImageSets/Main'):
            (root / folder).mkdir(parents=True, exist_ok=True)
        size = f'<size><width>{SIZE[1]}</width><height>{SIZE[0]}</height></size>'
        (root / 'Annotations' / f'{name}.xml').write_text(f'<annotation>{size}{content}</annotation>')
        (root / 'ImageSets/Main' / f'{split}.txt').write_text(f'{name} 1\n')
    return root


def thing(name: str, *box: int, difficult: int = 0) -> str:
    corners = ''.join(f'<{k}>{v}</{k}>' for k, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
    return f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>'


def run(monkeypatch, tmp_path, task: str, *arguments: str) -> dict:
    output = tmp_path / 'results.jsonl'
    common = ('--output', output, '--picture', tmp_path / f'{task}.png', '--cache', tmp_path / 'cache')
    monkeypatch.setattr(sys, 'argv', ['transfer', task, *map(str, (*arguments, *common, '--device', 'cpu'))])
    command.main()
    return json.loads(output.read_text().splitlines()[-1])


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', ('knn', 'linear', 'finetune'))
def test_classification_from_one_command(task, export, labeled, tmp_path, monkeypatch, capsys):
    arguments = ('--weights', export, '--data', labeled, '--size', '48')
    recipe = ('--epochs', '1', '--batch-size', '4') if task == 'finetune' else ()
    line = run(monkeypatch, tmp_path, task, *arguments, *recipe)
    assert line['name'] == f'{task}-labeled-vit-mte-seed0' and 0 <= line['result']['top1'] <= 100
    if task == 'knn':  # test images are the training images
        assert line['result']['top1'] == 100
    assert Image.open(tmp_path / f'{task}.png').size[0] > 500
    capsys.readouterr()
    assert run(monkeypatch, tmp_path, task, *arguments, *recipe) == line
    assert 'already' in capsys.readouterr().out


def test_runs_are_known_by_their_weights(export, labeled, tmp_path, monkeypatch):
    arguments = ('--data', labeled, '--size', '48')
    run(monkeypatch, tmp_path, 'knn', '--weights', export, *arguments)
    other = mte.wrap('test_vit', num_classes=0, img_size=SIZE, dynamic_img_size=True)
    folder = mte.save_pretrained(other, tmp_path / 'elsewhere' / Path(export).name)
    with pytest.raises(SystemExit, match='with another fingerprint'):
        run(monkeypatch, tmp_path, 'knn', '--weights', folder, *arguments)


def test_decoded_pictures_and_classes_are_those_of_the_folder(export, labeled, tmp_path, monkeypatch):
    first = run(monkeypatch, tmp_path, 'knn', '--weights', export, '--data', labeled, '--size', '48')
    assert first['result']['top1'] == 100
    for path in (labeled / 'val').glob('*/*.png'):
        picture(path, 99)  # all alike now: half of them are right
    images._decoded.cache_clear()  # as another process
    (tmp_path / 'results.jsonl').unlink()
    again = run(monkeypatch, tmp_path, 'knn', '--weights', export, '--data', labeled, '--size', '48')
    assert again['result']['top1'] == 50
    (labeled / 'val' / 'class0').rename(labeled / 'val' / 'class7')
    (tmp_path / 'results.jsonl').unlink()
    with pytest.raises(SystemExit, match='other folders of classes'):
        run(monkeypatch, tmp_path, 'knn', '--weights', export, '--data', labeled, '--size', '48')


@pytest.mark.parametrize(
    'arguments',
    (('detect', '--limit', '3'), ('knn', '--lr', '1'), ('detect', '--void', '0'), ('finetune', '--weights', 'pixels')),
)
def test_options_that_would_do_nothing_are_refused(arguments, export, tmp_path, monkeypatch, capsys):
    task, *rest = arguments
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, task, '--weights', export, '--data', tmp_path, *rest)
    assert f'{rest[0]}: only for' in capsys.readouterr().err


def test_too_few_pictures_for_a_batch_are_told(export, masked, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='0 batches of 8'):
        run(monkeypatch, tmp_path, 'segment', '--weights', export, '--data', masked, '--size', *SIZE)


@pytest.mark.parametrize('head', (('--head', 'linear', '--frozen'), ('--channels', '8')))
def test_segmentation_from_one_command(head, export, masked, tmp_path, monkeypatch):
    recipe = ('--epochs', '1', '--batch-size', '2', '--size', *SIZE)
    line = run(monkeypatch, tmp_path, 'segment', '--weights', export, '--data', masked, *recipe, *head)
    assert 0 <= line['result']['miou'] <= 100 and len(line['result']['iou']) == 3
    assert Image.open(tmp_path / 'segment.png').size == (3 * 66 + 2, 4 * 50 + 2)


@pytest.mark.parametrize('kind', ('boxes', 'masks', 'voc'))
def test_detection_from_one_command(kind, export, tmp_path, monkeypatch):
    data = tmp_path / 'data'
    if kind == 'voc':
        voc(data, thing('cell', 5, 5, 24, 20))
    else:
        coco(data, BOXES, masks=kind == 'masks')
    recipe = ('--epochs', '1', '--batch-size', '1', '--size', *SIZE, '--channels', '8')
    line = run(monkeypatch, tmp_path, 'detect', '--weights', export, '--data', data, *recipe)
    assert ('mask map' in line['result']) == (kind == 'masks') and 0 <= line['result']['map'] <= 100
    assert (tmp_path / 'detect.png').exists()


# --- backbones and their maps ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ('test_vit', 'test_convnext', 'test_resnet', 'swin_tiny_patch4_window7_224'))
@pytest.mark.parametrize('only_last', (False, True))
def test_maps_have_the_strides_that_necks_take(name, only_last):
    small = {'depths': (1, 1, 1, 1), 'embed_dim': 24} if 'swin' in name else {}
    sized = {'img_size': (64, 96)} if name[:8] in ('test_vit', 'swin_tin') else {}
    maps = Maps(timm.create_model(name, num_classes=0, **sized, **small), (64, 96), only_last)
    shapes = [tuple(m.shape) for m in maps(torch.randn(2, 3, 64, 96))]
    assert shapes == [(2, w, 64 // s, 96 // s) for w, s in zip(maps.widths, STRIDES)]


def test_map_of_a_vit_is_its_patch_tokens(export):
    model = load(export, SIZE).eval()
    x = torch.randn(1, 3, *SIZE)
    tokens = model.forward_features(x)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(Maps(model, SIZE).last(x).flatten(2).mT, tokens)


def test_frozen_backbone_stays_as_it_was():
    model = timm.create_model('test_resnet', num_classes=0)  # with statistics of batches
    before = {k: v.clone() for k, v in model.state_dict().items()}
    maps = Maps(model, (64, 64), frozen=True)
    segmenter = Segmenter(maps, 2, 'linear', 8)
    batch = torch.randn(4, 3, 64, 64)
    fit(segmenter, model, [batch] * 2, lambda x: segmenter(x).square().mean(), Recipe(2, 4, 0.1), 'test')
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert segmenter.head[1].weight.grad is not None


def test_first_layers_learn_slower():
    model = timm.create_model('test_vit', num_classes=2)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = Recipe(1, 1, 1e-3, layer_decay=0.1, weight_decay=0.0)
    fit(model, model, [torch.randn(2, 3, 160, 160)], lambda x: model(x).square().mean(), recipe, 'test')
    moved = {k: (v - start[k]).abs().max().item() for k, v in model.state_dict().items()}
    assert moved['patch_embed.proj.weight'] < 0.02 * moved['blocks.5.mlp.fc2.weight'] < moved['head.weight']


def test_backbone_that_cannot_serve_is_refused_by_name(export, tmp_path):
    with pytest.raises(ValueError, match='has no config'):
        load(str(tmp_path), SIZE)
    with pytest.raises(ValueError, match='neither a folder'):
        load('vit_of_nobody', SIZE)
    with pytest.raises(ValueError, match=r'no multiple of patches.*try 48 64'):
        load(export, (50, 60))
    with pytest.raises(ValueError, match='gives no maps'):
        Maps(torch.nn.Flatten(), SIZE)
    with pytest.raises(FloatingPointError, match='lower --lr'):
        layer = torch.nn.Linear(1, 1)
        fit(layer, torch.nn.Identity(), [0], lambda _: layer.weight.sum() * float('nan'), Recipe(1, 1, 1.0), 'test')


# --- masks -------------------------------------------------------------------------------------------------------


def test_mean_iou_is_that_of_a_loop_over_pixels(masked, tmp_path):
    _, data = open_masked(str(masked), ())
    assert data.classes == (1, 4, 9)
    guesses = [torch.randint(3, SIZE) for _ in range(len(data))]
    order = iter(guesses)
    logits_of = lambda image: torch.nn.functional.one_hot(next(order), 3).permute(2, 0, 1).float()
    result = segment.tested(logits_of, data, SIZE, tmp_path / 'p.png')
    both, either = np.zeros(3), np.zeros(3)
    for (_, truth), guess in zip((data[i] for i in range(len(data))), guesses):
        for t, g in zip(truth.flatten().tolist(), guess.flatten().tolist()):
            if t == IGNORED:
                continue
            both[t] += t == g
            either[t] += 1
            either[g] += t != g
    assert result['miou'] == pytest.approx((100 * both / either).mean(), abs=1e-4)


def test_crops_add_no_class(masked):
    """What lies outside a picture that was scaled down is not learnt."""
    train, test = open_masked(str(masked), ())
    seen = []
    maps = Maps(timm.create_model('test_vit', num_classes=0, img_size=SIZE), SIZE)
    original = torch.nn.functional.cross_entropy

    def watch(logits, y, ignore_index):
        seen.append(set(y.unique().tolist()))
        return original(logits, y, ignore_index=ignore_index)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segment.F, 'cross_entropy', watch)
        picture = masked / 'p.png'
        segment.segment(maps, (train, test), SIZE, 'linear', 8, Recipe(3, 2, 1e-3), 'cpu', 0, 'test', picture)
    assert set().union(*seen) == {IGNORED, 0, 1, 2}


def test_training_crops_have_the_scale_of_testing(masked):
    """A picture of the wanted size, scaled by 1, fills the crop though it is wider than high."""
    train, test = open_masked(str(masked), ())
    maps = Maps(timm.create_model('test_vit', num_classes=0, img_size=SIZE), SIZE)
    with pytest.MonkeyPatch.context() as patched:
        jitter = segment.v2.ScaleJitter
        patched.setattr(segment.v2, 'ScaleJitter', lambda size, scales: jitter(size, (1.0, 1.0)))
        patched.setattr(segment.v2, 'RandomHorizontalFlip', lambda: lambda image, mask: (image, mask))
        segment.segment(maps, (train, test), SIZE, 'linear', 8, Recipe(1, 2, 1e-3), 'cpu', 0, 'test', masked / 'p.png')
        seen = train[0][1]
    plain = open_masked(str(masked), ())[0][0][1]
    assert torch.equal(seen, plain)


@pytest.mark.parametrize(
    'broken, message',
    (
        (lambda root: mask(root / 'masks/val/0.png', np.full(SIZE, 5)), r'val/0.png has \[5\].*--void 5'),
        (lambda root: mask(root / 'masks/val/0.png', np.full((4, 4), 1)), r'is of \(4, 4\)'),
        (lambda root: picture(root / 'masks/val/0.png', 0), 'is RGB; a mask has one channel'),
        (lambda root: (root / 'masks/val/0.png').unlink(), 'has no mask 0.png'),
        (lambda root: [p.unlink() for p in (root / 'images/train').iterdir()], 'has no pictures'),
        (lambda root: (root / 'masks').rename(root / 'other'), 'has none of'),
    ),
)
def test_masks_that_are_wrong_are_named(broken, message, masked):
    broken(masked)
    with pytest.raises(ValueError, match=message):
        _, test = open_masked(str(masked), ())
        list(map(test.__getitem__, range(len(test))))


def test_void_values_are_no_class(masked):
    train, _ = open_masked(str(masked), (255, 9))
    assert train.classes == (1, 4)
    assert isinstance(train, Masked) and set(train[0][1].unique().tolist()) == {IGNORED, 0, 1}


# --- boxes -------------------------------------------------------------------------------------------------------


def found_in(data: Boxed, change=lambda boxes: boxes):
    """A detector that knows the boxes, changed by ``change``."""
    targets = iter([data[i][1] for i in range(len(data))])

    def find(image):
        target = next(targets)
        masks = {'masks': target['masks'][:, None].float()} if data.has_masks else {}
        boxes = change(torch.Tensor(target['boxes']))
        return {'boxes': boxes, 'labels': target['labels'], 'scores': torch.ones(len(boxes)), **masks}

    return find


@pytest.mark.parametrize('masks', (False, True))
def test_average_precision_knows_right_from_wrong(masks, tmp_path):
    _, data = open_boxed(str(coco(tmp_path, BOXES, masks=masks)))
    assert data.classes == ['cell', 'plate'] and data[0][1]['labels'].tolist() == [1, 2]
    right = detect.tested(found_in(data), data, SIZE, tmp_path / 'p.png')
    assert set(map(round, right.values())) == {100}
    wrong = detect.tested(found_in(data, lambda b: b + 40), data, SIZE, tmp_path / 'p.png')
    assert wrong['map'] == 0
    near = detect.tested(found_in(data, lambda b: b + torch.tensor([0, 0, 2.0, 0])), data, SIZE, tmp_path / 'p.png')
    assert 50 < near['map'] < 100 and round(near['map 50']) == 100


def test_picture_without_boxes_is_background(tmp_path, export):
    train, _ = open_boxed(str(coco(tmp_path, BOXES, masks=True)))
    image, target = train[3]
    assert target['boxes'].shape == (0, 4) and target['masks'].shape == (0, *SIZE)
    model = make_detector(Maps(load(export, SIZE), SIZE, only_last=True), train, SIZE, 8).train()
    assert isinstance(model, MaskRCNN) and isinstance(model.backbone.fpn.inner_blocks[0][1], LayerNorm2d)
    loss = sum(model([image], [{k: torch.as_tensor(v) for k, v in target.items()}]).values())
    loss.backward()
    assert loss.isfinite()


def test_crowds_are_not_learnt_and_not_counted(tmp_path):
    crowd = {'id': 9, 'image_id': 1, 'bbox': [2, 2, 30, 30], 'iscrowd': 1}
    train, test = open_boxed(str(coco(tmp_path, [*BOXES, crowd])))
    assert len(train[1][1]['boxes']) == 1 and test[1][1]['iscrowd'].tolist() == [0, 1]

    inner = found_in(test)

    def find(image):
        found = inner(image)
        kept = found['boxes'][:, 2] - found['boxes'][:, 0] != 30  # misses the crowd
        return {k: v[kept] for k, v in found.items()}

    assert round(detect.tested(find, test, SIZE, tmp_path / 'p.png')['map']) == 100


@pytest.mark.parametrize('box', ([60, 4, 20, 10], [-3, 4, 10, 10], [70, 50, 5, 5]))
def test_box_outside_its_picture_is_named(box, tmp_path):
    with pytest.raises(ValueError, match=r'annotation 5 of .* not inside 2.png, which is 64 x 48'):
        open_boxed(str(coco(tmp_path, [*BOXES, {'id': 5, 'image_id': 2, 'bbox': box}])))


def test_box_without_area_is_left_out_and_told(tmp_path, capsys):
    train, test = open_boxed(str(coco(tmp_path, [*BOXES, {'id': 5, 'image_id': 2, 'bbox': [4, 4, 2, 0]}])))
    assert len(train[2][1]['boxes']) == len(test[2][1]['boxes']) == 1
    assert '1 boxes without area are left out' in capsys.readouterr().err


def test_annotations_that_say_different_things_are_refused(tmp_path):
    with pytest.raises(ValueError, match='annotation 5 has no category 4'):
        open_boxed(
            str(coco(tmp_path / 'a', [*BOXES, {'id': 5, 'image_id': 2, 'bbox': [4, 4, 2, 2], 'category_id': 4}]))
        )
    root = coco(tmp_path / 'b', BOXES, masks=True)
    path = root / 'annotations/instances_val2017.json'
    content = json.loads(path.read_text())
    del content['annotations'][0]['segmentation']
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match='not all annotations have masks'):
        open_boxed(str(root))


def test_pascal_voc_counts_pixels_from_one(tmp_path):
    things = thing('cell', 1, 1, 64, 48) + thing('plate', 10, 20, 10, 20) + thing('cell', 2, 3, 9, 9, difficult=1)
    train, test = to_coco(voc(tmp_path, things), tmp_path)
    content = json.loads(train.read_text())
    assert [a['bbox'] for a in content['annotations']] == [[0, 0, 64, 48], [9, 19, 1, 1], [1, 2, 8, 7]]
    assert [a['category_id'] for a in content['annotations']] == [1, 2, 1]
    assert [a['iscrowd'] for a in content['annotations']] == [0, 0, 1]
    assert json.loads(test.read_text())['categories'] == content['categories']


@pytest.mark.parametrize(
    'objects, test_objects, message',
    (
        (thing('cell', 1, 1, 5, 5), thing('star', 1, 1, 5, 5), r"b.xml has 'star', which no training picture has"),
        ('<object><name>cell</name></object>', '', r'a.xml: has no bndbox/xmin'),
        (thing('cell', 1, 1, 99, 5), '', r'not inside a.png'),
        ('<object>', '', r'a.xml: mismatched tag'),
    ),
)
def test_annotation_that_is_wrong_is_named(objects, test_objects, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_boxed(str(voc(tmp_path, objects, test_objects)))


def test_folder_that_is_neither_is_told_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match='as COCO, nor ImageSets/Main, as Pascal VOC'):
        open_boxed(str(tmp_path))
    (coco(tmp_path, BOXES) / 'annotations/instances_val2017.json').unlink()
    with pytest.raises(ValueError, match=r'has no .*instances_val2017'):
        open_boxed(str(tmp_path))


def test_table_pairs_runs_by_seed_of_pretraining():
    def line(task: str, variant: str, seed: int, value: float, **more) -> dict:
        metric = 'miou' if task == 'segment' else 'top1'
        return {'task': task, 'weights': f'dino-{variant}-seed{seed}', 'data': 'd', 'result': {metric: value}, **more}

    lines = [
        line('knn', 'plain', 0, 50.0),
        line('knn', 'plain', 9, 99.0),
        line('knn', 'mte', 0, 51.0),
        line('knn', 'mte', 0, 53.0),
    ]
    lines += [line('segment', v, s, 10.0 * s + (v == 'mte')) for v in ('plain', 'mte') for s in (1, 2)]
    lines += [line('segment', v, 1, 5.0, frozen=True) for v in ('plain', 'mte')]
    lines += [{**line('knn', v, 0, 7.0), 'weights': f'cifar10-dino-{v}-seed0'} for v in ('plain', 'mte')]
    lines.append({**line('knn', 'plain', 0, 40.0), 'weights': 'dino-plain-seed0-untrained'})
    rows = table({str(i): each for i, each in enumerate(lines)})[2:]
    assert rows == [
        '| DINO | k-NN | d | accuracy | 40.0 | 50.0 | 52.0 | +2.0 |  | 0 |',
        '| DINO | segmentation, frozen | d | mean IoU |  | 5.0 | 5.0 | +0.0 |  | 1 |',
        '| DINO | segmentation | d | mean IoU |  | 15.0 | 16.0 | +1.0 ± 0.0 | +1.2 | 1, 2 |',
        '| DINO, of cifar10 | k-NN | d | accuracy |  | 7.0 | 7.0 | +0.0 |  | 0 |',
    ]


# --- the paper's detector, in iBOT's repository ------------------------------------------------------------------

IBOT = """
import sys
from unittest.mock import MagicMock
import torch
for name in ('', '.fileio', '.parallel', '.runner', '.utils'):
    sys.modules[f'mmcv{name}'] = MagicMock()
for name in ('', '.utils', '.models', '.models.builder'):
    sys.modules[f'mmdet{name}'] = MagicMock()
sys.modules['mmdet.models.builder'].BACKBONES.register_module = lambda: lambda kind: kind
sys.modules['mmcv.runner'].get_dist_info = lambda: (0, 1)
sys.path[:0] = [REPOSITORY, f'{REPOSITORY}/evaluation/object_detection']
from mmcv_custom import checkpoint, register_backbone
checkpoint._load_checkpoint = lambda path, where: torch.load(path, map_location=where)
said = []
checkpoint.load_state_dict = lambda module, state, *_: said.append(module.load_state_dict(state, strict=False))
model = register_backbone.VisionTransformer(
    img_size=[48, 48], patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3., qkv_bias=True,
    out_indices=[5], with_fpn=False, out_with_norm=True,
)
model.init_weights(WEIGHTS)
model.eval()
torch.save((said[0].missing_keys, said[0].unexpected_keys, model(torch.load(IMAGES))[-1]), OUT)
"""


@pytest.mark.upstream
@pytest.mark.skipif(not os.environ.get('MTE_UPSTREAM'), reason='MTE_UPSTREAM names no folder with clones')
def test_ibots_detector_takes_the_export(tmp_path):
    folder = mte.save_pretrained(mte.wrap('test_vit', num_classes=0, img_size=48), tmp_path / 'vit')
    weights, images, out = (tmp_path / f'{name}.pth' for name in ('weights', 'images', 'out'))
    torch.save(safetensors.torch.load_file(folder / 'model.safetensors'), weights)
    x = torch.randn(2, 3, 48, 48)
    torch.save(x, images)
    repository = Path(os.environ['MTE_UPSTREAM'], 'ibot')
    names = {'REPOSITORY': repository, 'WEIGHTS': weights, 'IMAGES': images, 'OUT': out}
    code = ''.join(f'{name} = {str(value)!r}\n' for name, value in names.items()) + IBOT
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert not run.returncode, run.stderr[-2000:]
    missing, unexpected, features = torch.load(out)
    assert missing == unexpected == []
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    expected = model.forward_intermediates(x, indices=[5], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
