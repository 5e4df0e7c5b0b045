"""The tests on every supported Python, with the newest and the oldest supported torch and timm.

nox                     # what interpreters there are
nox -s tests-3.12       # one of them
nox -s floor            # the oldest torch and timm
"""

import configparser
from pathlib import Path

import nox

nox.options.default_venv_backend = 'venv'
PYTHONS = ['3.10', '3.11', '3.12', '3.13']


def run(session: nox.Session, *args: str) -> None:
    """The tests, whose outcome goes to the table of versions; the next session finds the two in step."""
    try:
        session.run('python', '-m', 'pytest', f'--counts=benchmarks/results/versions/{session.name}.json', *args)
    finally:
        session.run('python', '-m', 'benchmarks.tables', 'docs/compatibility.md')


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The newest versions that pip finds."""
    session.install('-e', '.[demo,test]')
    run(session, *session.posargs)


@nox.session
def floor(session: nox.Session) -> None:
    """The oldest versions of setup.cfg, where examples, demo and study, which need newer ones, are left out."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).with_name('setup.cfg'), encoding='utf-8')
    oldest = [f'{r.replace(">=", "==")}.*' for r in setup['options']['install_requires'].split()]
    session.install('-e', '.', 'pytest', 'numpy<2.3', *oldest)  # numpy for torch 2.4
    without = ('examples', 'study', 'benchmarks', 'analysis')
    ignored = [f'--ignore=tests/test_{name}.py' for name in without]
    run(session, 'tests', *ignored, *session.posargs)
