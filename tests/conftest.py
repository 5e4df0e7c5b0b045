import json
import os
import platform
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


def pytest_configure(config) -> None:
    torch.set_num_threads(2)
    if config.getoption('--record'):
        config.pluginmanager.register(Recorder(config.getoption('--record')))


class Recorder:
    """Outcome of each test, with the versions it ran on."""

    def __init__(self, path: Path) -> None:
        self.path, self.outcomes, self.properties = path, {}, []

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
        temporary = self.path.with_suffix('.tmp')
        found = {'versions': versions, 'outcomes': self.outcomes, 'properties': self.properties}
        temporary.write_text(json.dumps(found, indent=1) + '\n')
        temporary.replace(self.path)
