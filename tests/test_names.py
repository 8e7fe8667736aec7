"""One name for one thing: class names are unique, and vague words are rare."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import job

FOLDER = Path(job.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
VAGUE = re.compile(r"(?<![a-z])(?:found|wanted|kept|whole|asked|said)(?![a-z])", re.I)
MOST_VAGUE = 150


def test_a_class_name_has_one_meaning() -> None:
    places = defaultdict(list)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{file.relative_to(FOLDER)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_vague_words_are_rare() -> None:
    counts = {
        str(file.relative_to(FOLDER)): len(VAGUE.findall(file.read_text(encoding="utf-8")))
        for file in FILES
    }
    worst = sorted(counts, key=lambda name: -counts[name])[:10]
    assert sum(counts.values()) < MOST_VAGUE, {name: counts[name] for name in worst}
