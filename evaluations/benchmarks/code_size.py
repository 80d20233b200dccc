"""Length of functions and files: the median and the 90th percentile of function bodies, and the files that are too long.

    python evaluations/benchmarks/code_size.py           # prints
    python evaluations/benchmarks/code_size.py --check   # also fails if bodies or files exceed their limits

The length of a body is its number of lines of code, without docstring, blank lines and comments. A function inside another
counts as part of it and by itself.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("robust_spectral", "plugins", "evaluations")
MEDIAN, PERCENTILE_90, FILE = 6, 25, 350
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class Function:
    """A function: its file, its name, and the number of lines of code in its body."""

    path: str
    name: str
    lines: int


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that contain code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {line for t in tokens if t.type not in _NO_CODE for line in range(t.start[0], t.end[0] + 1)}


def functions(path: Path) -> Iterator[Function]:
    """All functions and methods of a file."""
    source = path.read_text()
    code = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            held = {line for part in body for line in range(part.lineno, part.end_lineno + 1)} & code
            yield Function(str(path.relative_to(ROOT)), node.name, len(held))


def main() -> int:
    """Print the figures; status 1 with --check where one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    passed = True
    for folder in FOLDERS:
        paths = [path for path in sorted((ROOT / folder).rglob("*.py")) if "benchmarks" not in path.parts]
        found = [function for path in paths for function in functions(path)]
        sizes = [function.lines for function in found]
        median, top = statistics.median(sizes), statistics.quantiles(sizes, n=10)[-1]
        long = {path.name: lines for path in paths if (lines := len(path.read_text().splitlines())) > FILE}
        print(f"{folder}: {len(paths)} files, {len(found)} functions, median {median:g}, 90th percentile {top:g} lines")
        listed = ", ".join(f"{name} ({lines})" for name, lines in long.items())
        print(f"  {len(long)} files over {FILE} lines{': ' if long else ''}{listed}")
        for function in sorted(found, key=lambda f: -f.lines)[:3]:
            print(f"  longest: {function.lines} {function.path} {function.name}")
        passed = passed and median <= MEDIAN and top <= PERCENTILE_90 and not long
    return 0 if passed or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
