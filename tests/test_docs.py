"""What the texts name is there: files behind links, headings behind anchors, names and arguments in code."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import mte_timm as mte
from mte_timm.cli import main

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    [*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('patches/*.md'), *ROOT.glob('benchmarks/*.md')]
)


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('name', names(TEXTS))
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r'\]\((?!https?:|mailto:)([^)\s]+)\)', path.read_text()):
        file, _, anchor = target.partition('#')
        to = (path.parent / file).resolve() if file else path
        assert to.exists(), f'{name}: {target}'
        if anchor:
            assert anchor in anchors(to.read_text()), f'{name}: {target}'


def code_of(path):
    """Blocks of Python; the examples with prompts are run as doctests, and count here too."""
    for block in re.findall(r'^```python\n(.*?)^```', path.read_text(), re.MULTILINE | re.DOTALL):
        if '>>> ' in block:
            block = '\n'.join(line[4:] for line in block.splitlines() if line.startswith(('>>> ', '... ')))
        yield block


@pytest.mark.parametrize('name', names(p for p in TEXTS if '```python' in p.read_text()))
def test_code_uses_what_there_is(name):
    pytest.importorskip('matplotlib')
    from mte_timm import analysis

    for code in code_of(ROOT / name):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {'mte': mte, 'analysis': analysis}.get(node.value.id)
                assert owner is None or node.attr in {*owner.__all__, 'analysis'}, f'{name}: {ast.unparse(node)}'
            if isinstance(node, ast.Call) and re.fullmatch(r'(mte|analysis)\.\w+', ast.unparse(node.func)):
                owner, function = ast.unparse(node.func).split('.')
                parameters = inspect.signature(getattr({'mte': mte, 'analysis': analysis}[owner], function)).parameters
                if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                    assert {k.arg for k in node.keywords if k.arg} <= set(parameters), f'{name}: {ast.unparse(node)}'


@pytest.mark.parametrize('name', names(p for p in TEXTS if 'mte-timm strip' in p.read_text()))
def test_commands_have_the_options_that_are_named(name, capsys):
    text = (ROOT / name).read_text()
    for command in ('strip', 'push'):
        with pytest.raises(SystemExit):
            main([command, '--help'])
        known = set(re.findall(r'--[\w-]+', capsys.readouterr().out))
        for line in re.findall(rf'mte-timm {command} .*', text):
            used = set(re.findall(r'(?<!\S)--[\w-]+', line.split('`')[0]))
            assert used <= known, f'{name}: {line}'
