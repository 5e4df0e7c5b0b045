"""Boxes of Pascal VOC's format in COCO's."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

__all__ = ['to_coco']


def to_coco(root: Path, folder: Path) -> list[Path]:
    """Writes ``train.json`` and ``test.json``: of ``trainval.txt`` and ``test.txt``, or ``train.txt`` and ``val.txt``.

    Pascal VOC counts pixels from 1 and its last ones are inside, so a box of xmin = xmax is one pixel wide.

    Args:
        root: Has ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``.
        folder: Where the files go.

    Raises:
        ValueError: lists or pictures are missing, an annotation is not as it should be, or a test class is unknown.
    """
    lists = Path(root, 'ImageSets/Main')
    splits = ('trainval', 'test') if Path(lists, 'test.txt').exists() else ('train', 'val')
    classes: dict[str, int] = {}
    written = []
    for split, which in zip(splits, ('train', 'test')):
        if not Path(lists, f'{split}.txt').is_file():
            raise ValueError(f'--data {root}: has no ImageSets/Main/{split}.txt')
        names = [line.split()[0] for line in Path(lists, f'{split}.txt').read_text().splitlines() if line.strip()]
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for name in names:
            path = Path(root, 'Annotations', f'{name}.xml')
            try:
                top = ET.parse(path).getroot()
                width, height = (int(_text(top, f'size/{side}')) for side in ('width', 'height'))
                images.append(
                    {'id': len(images), 'file_name': picture_of(root, name), 'width': width, 'height': height}
                )
                for found in top.iter('object'):
                    label = _text(found, 'name')
                    if which == 'train':
                        classes.setdefault(label, len(classes) + 1)
                    left, upper, right, lower = (
                        float(_text(found, f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax')
                    )
                    box = [left - 1, upper - 1, right - left + 1, lower - upper + 1]
                    annotations.append(
                        {
                            'id': len(annotations) + 1,
                            'image_id': len(images) - 1,
                            'category_id': classes[label],
                            'bbox': box,
                            'area': box[2] * box[3],
                            'iscrowd': int(
                                found.findtext('difficult') == '1'
                            ),  # not learnt, and no error where it is found
                        }
                    )
            except (OSError, ET.ParseError, ValueError) as e:
                raise ValueError(f'--data: {path}: {e}') from e
            except KeyError as e:
                raise ValueError(f'--data: {path} has {e}, which no training picture has') from None
        categories = [{'id': i, 'name': label} for label, i in classes.items()]
        written.append(folder / f'{which}.json')
        written[-1].write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))
    return written


def picture_of(root: Path, name: str) -> str:
    """Name of a picture's file, whatever its kind."""
    found = [p.name for p in Path(root, 'JPEGImages').glob(f'{name}.*')]
    if not found:
        raise ValueError(f'has no picture {name}.jpg in JPEGImages')
    return found[0]


def _text(element: Any, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f'has no {path}')
    return str(text)
