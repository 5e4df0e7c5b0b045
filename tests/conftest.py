import json
import os
import platform
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch

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
