import json
import os
import platform
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import safetensors.torch
import torch
import zoo

import mte_timm as mte
from mte_timm.cli import main

RECORDED = (
    'torch',
    'timm',
    'huggingface-hub',
    'safetensors',
    'transformers',
    'onnxruntime',
    'segmentation-models-pytorch',
    'torchvision',
    'fastai',
    'pytorch-lightning',
    'lightly',
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def strip(tmp_path):
    """Saves ``content`` as c.pth, and strips it for the zoo's small ViT or another architecture of timm."""

    def run(content, name=zoo.NAME, key=None, file='c.pth', **kwargs):
        save = safetensors.torch.save_file if file.endswith('.safetensors') else torch.save
        save(content, tmp_path / file)
        return mte.strip_checkpoint(tmp_path / file, name, key, **(zoo.SIZE if name == zoo.NAME else {}) | kwargs)

    return run


@pytest.fixture
def command(tmp_path, capsys):
    """mte-timm strip of c.pth: its exit code, what it printed, and the config that it wrote."""

    def run(*options, out='out', model=zoo.NAME, kwargs=zoo.SIZE):
        arguments = ['strip', tmp_path / 'c.pth', '-o', tmp_path / out, '--model', model]
        arguments += ['--model-kwargs', *(f'{k}={v!r}' for k, v in kwargs.items()), *options]
        code, printed, config = main([*map(str, arguments)]), capsys.readouterr(), tmp_path / out / 'config.json'
        config = json.loads(config.read_text()) if config.exists() else None
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, config=config)

    return run


def pytest_addoption(parser) -> None:
    parser.addoption('--record', type=Path, metavar='FILE', help='write outcomes and versions as JSON')
    parser.addoption('--counts', type=Path, metavar='FILE', help='write how many passed, and versions, as JSON; with =')


def pytest_configure(config) -> None:
    torch.set_num_threads(2)
    if config.getoption('--record') or config.getoption('--counts'):
        config.pluginmanager.register(Recorder(config.getoption('--record'), config.getoption('--counts')))


class Recorder:
    """Outcome of each test, with the versions it ran on."""

    def __init__(self, path, path_of_counts) -> None:
        self.path, self.path_of_counts = path, path_of_counts
        self.outcomes, self.properties, self.began = {}, [], time.monotonic()

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == 'call' or not report.passed:  # skipped and broken set-ups have no call
            self.outcomes[report.nodeid] = report.outcome
            self.properties += [value for _, value in report.user_properties]

    def pytest_sessionfinish(self) -> None:
        versions = {'python': platform.python_version()}
        for name in RECORDED:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = None
        if self.path:
            write(self.path, {'versions': versions, 'outcomes': self.outcomes, 'properties': self.properties})
        if self.path_of_counts:
            found = {'versions': versions, 'counts': Counter(self.outcomes.values())}
            found['failed'] = [name for name, outcome in self.outcomes.items() if outcome == 'failed']
            write(self.path_of_counts, {**found, 'seconds': round(time.monotonic() - self.began)})


def write(path, found) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(found, indent=1) + '\n')
    temporary.replace(path)
