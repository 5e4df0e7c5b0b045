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
import zoo

from mte_timm import requirements

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('kind', [k for k in requirements.TIMM_NAMES if k != 'block'])
def test_timm_still_has_the_names_in_use(kind):
    one = {'VisionTransformer': 'plain', 'Eva': 'eva02', 'NaFlexVit': 'naflex', 'Cait': 'cait', 'Xcit': 'xcit'}
    for name in zoo.ALL if kind == 'every model' else [one[kind]]:
        model = zoo.build(name)
        assert kind == 'every model' or type(model).__name__ == kind
        gone = [n for n in requirements.TIMM_NAMES[kind] if not hasattr(model, n)]
        assert not gone, f'timm {timm.__version__}: {type(model).__name__} has no {", ".join(gone)} any more'


@pytest.mark.parametrize('name', ['plain', 'parallel_scaling', 'parallel_things', 'post_norm', 'eva02', 'rope_mixed'])
def test_blocks_of_timm_take_a_mask(name):
    arguments = inspect.signature(zoo.build(name).blocks[0].forward).parameters
    assert set(requirements.TIMM_NAMES['block']) <= set(arguments), f'timm {timm.__version__}: {name}'


def test_private_names_are_in_the_list():
    listed = {n for names in requirements.TIMM_NAMES.values() for n in names}
    for path in (ROOT / 'mte_timm' / 'backbones').glob('*.py'):
        if path.name.startswith('ssl_'):  # other repositories' classes
            continue
        used = set(re.findall(r'\bmodel\.(_\w+)', path.read_text()))
        assert used <= listed, f'{path.name} uses {used - listed}, not in mte_timm/requirements.py'


@pytest.mark.parametrize(('name', 'version'), [('timm', '1.0.15'), ('torch', '2.3.1+cpu')])
def test_older_versions_are_refused_on_import(name, version, monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, 'version', lambda n: version if n == name else real(n))
    with pytest.raises(ImportError, match=rf'needs {name} .* or newer, here is {version[:5]}.*pip install'):
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
