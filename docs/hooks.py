"""For mkdocs: pages that the repository has elsewhere, with their pictures; examples in docstrings are code."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / 'benchmarks'


def on_files(files: Any, config: Any) -> Any:
    text = (BENCHMARKS / 'REPORT.md').read_text(encoding='utf-8')
    for path in map(Path, re.findall(r'!\[.*?\]\((.*?)\)', text)):
        name = f'evidence/{path.parent.name}/{path.name}'
        files.append(File.generated(config, name, abs_src_path=str(BENCHMARKS / path)))
    text = re.sub(r'(!\[.*?\]\().*?([^/]+/[^/]+\.png\))', r'\1evidence/\2', text).replace('(README.md)', '(cost.md)')
    files.append(File.generated(config, 'evidence.md', content=text))
    patches = (ROOT / 'patches' / 'README.md').read_text(encoding='utf-8').replace('(../docs/', '(')
    files.append(File.generated(config, 'patches.md', content=patches))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the repository that are pages here."""
    for file, made in (('benchmarks/REPORT', 'evidence'), ('patches/README', 'patches')):
        markdown = markdown.replace(f'../{file}.md', f'{made}.md')
    return markdown


class Docstrings(griffe.Extension):
    """Doctests as fenced code, and Sphinx's roles as plain code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r':\w+:`~?([\w.]+)`', r'`\1`', obj.docstring.value)
            obj.docstring.value = re.sub(r'(?m)^>>> (?:.+\n?)+', lambda m: f'```python\n{m[0].rstrip()}\n```\n', text)
