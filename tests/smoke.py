"""What an installed package must do, wherever it is installed: `make dist` runs this in empty environments."""

import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch

import mte_timm as mte


def main() -> None:
    here = Path(mte.__file__).resolve()
    assert here.parents[1] != Path(__file__).resolve().parents[1], f'{here}: is the source, not what was installed'
    assert (here.parent / 'py.typed').exists()
    student = mte.wrap('test_vit', head=lambda dim: torch.nn.Linear(dim, 16))
    teacher = mte.make_teacher(student)
    x = torch.randn(2, 3, 160, 160)
    mte.MTELoss(torch.nn.MSELoss())(student(x), teacher(x)).backward()
    with tempfile.TemporaryDirectory() as folder:
        torch.save({'teacher': teacher.state_dict()}, f'{folder}/checkpoint.pth')
        command = [str(Path(sys.executable).with_name('mte-timm')), 'strip', f'{folder}/checkpoint.pth']
        subprocess.run([*command, '--model', 'test_vit', '-o', f'{folder}/out'], check=True)
        plain = timm.create_model(f'local-dir:{folder}/out', pretrained=True).eval()
        assert torch.equal(plain(x), teacher.eval().backbone(x))
    print(f'mte_timm {mte.__version__} of {here.parent}: works')


if __name__ == '__main__':
    main()
