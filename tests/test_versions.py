"""The floors, and what the library uses of timm beyond its promises."""

import configparser
import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
import zoo

from mte_timm import requirements

ROOT = Path(__file__).parents[1]


ONE = {
    'VisionTransformer': 'plain', 'VisionTransformerDistilled': 'distilled', 'Eva': 'eva02', 'NaFlexVit': 'naflex',
    'Cait': 'cait', 'Xcit': 'xcit', 'SwinTransformer': 'swin',
}  # fmt: skip


def owners(kind):
    """What must have the names that are listed under ``kind``."""
    if kind.startswith('timm.'):
        return [getattr(timm, kind.removeprefix('timm.'))]
    if kind == 'every model':
        return [zoo.build(name) for name in zoo.ALL]
    if kind in ONE:
        model = zoo.build(ONE[kind])
        assert type(model).__name__ == kind
        return [model]
    if kind == 'NormMlpClassifierHead':
        return [zoo.build('convnext').head]
    models = [zoo.build(name) for name in ('plain', 'eva02', 'hybrid')]
    if kind == 'module of an architecture':
        return [sys.modules[type(m).__module__] for m in models]
    return [m.blocks[0].attn if kind == 'attention of a block' else m.patch_embed for m in models]


@pytest.mark.parametrize('kind', [k for k in requirements.TIMM_NAMES if k != 'block'])
def test_timm_still_has_the_names_in_use(kind):
    for owner in owners(kind):
        name = getattr(owner, '__name__', type(owner).__name__)
        gone = [n for n in requirements.TIMM_NAMES[kind] if not hasattr(owner, n)]
        assert not gone, f'timm {timm.__version__}: {name} has no {", ".join(gone)} any more'


@pytest.mark.skipif(zoo.timm_before(1, 0, 31), reason='an older timm has them not, and the library does without')
@pytest.mark.parametrize('kind', list(requirements.NEWER_NAMES))
def test_timm_still_has_the_newer_names_in_use(kind):
    for owner in owners(kind):
        gone = [n for n in requirements.NEWER_NAMES[kind] if not hasattr(owner, n)]
        assert not gone, f'timm {timm.__version__}: {kind} has no {", ".join(gone)} any more'


@pytest.mark.parametrize('name', ['plain', 'parallel_scaling', 'parallel_things', 'post_norm', 'eva02', 'rope_mixed'])
def test_blocks_of_timm_take_a_mask(name):
    arguments = inspect.signature(zoo.build(name).blocks[0].forward).parameters
    assert set(requirements.TIMM_NAMES['block']) <= set(arguments), f'timm {timm.__version__}: {name}'


def test_names_in_use_are_in_the_list():
    """What the code of timm's families reads of a model, its embedding or its attention, and takes from timm."""
    lists = (requirements.TIMM_NAMES, requirements.NEWER_NAMES)
    listed = {n for names in lists for some in names.values() for n in some}
    torch_has = set(dir(torch.nn.Module())) | {'shape', 'attn', 'module'}
    reads = r"\b(?:model|embed|m)\.([a-z_]\w*)|(?:getattr|hasattr)\((?:model|embed|m), '(\w+)'"
    for path in (ROOT / 'mte_timm').rglob('*.py'):
        text = path.read_text()
        used = {n for line in re.findall(r'^from timm\.\w+ import (.+)$', text, re.MULTILINE) for n in line.split(', ')}
        used |= set(re.findall(r'\btimm\.models\.(\w+)\(', text))
        if path.stem in ('vit', 'eva', 'naflex', 'class_attention', 'feature_map'):
            used |= {a or b for a, b in re.findall(reads, text)} - torch_has
        assert used <= listed, f'{path.name} uses {used - listed}, not in mte_timm/requirements.py'


@pytest.mark.parametrize(('name', 'version'), [('timm', '1.0.15'), ('torch', '2.3.1+cpu')])
def test_older_versions_are_refused_on_import(name, version, monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, 'version', lambda n: version if n == name else real(n))
    with pytest.raises(ImportError, match=rf'needs {name} .* or newer, here is {version[:5]}.*pip install'):
        requirements.check_versions()


def test_a_build_without_metadata_is_no_error(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, 'version', version)
    requirements.check_versions()


def test_floors_are_those_of_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    required = config['options']['install_requires'].split()
    for name, floor in requirements.FLOORS.items():
        assert f'{name}>={".".join(map(str, floor))}' in required


def test_import_is_light():
    script = 'import sys, mte_timm; print([m for m in ("matplotlib", "sklearn", "lightly") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
