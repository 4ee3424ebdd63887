"""Functions and the first line of their docstrings: what fine-tuning and evaluation are made of."""

import ast
import inspect
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FEWEST_WORDS, MOST_CHARACTERS = 6, 200


@dataclass(frozen=True)
class Documented:
    """A function's signature and its one-sentence summary."""

    signature: str
    summary: str

    def halves(self) -> tuple[str, str]:
        """The summary cut between two words, in the middle: `("Return the", "number of bytes.")`."""
        words = self.summary.split(" ")
        return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def documented_functions(documents: Iterable[dict[str, str]]) -> Iterator[Documented]:
    """Every function of `documents` whose docstring opens with a sentence of its own; one per summary."""
    seen: set[str] = set()
    for document in documents:
        for function in _functions(document["text"]):
            found = _documented(function)
            if found and found.summary not in seen:
                seen.add(found.summary)
                yield found


def _functions(source: str) -> list[ast.FunctionDef]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in library sources
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _documented(function: ast.FunctionDef) -> Documented | None:
    paragraph = inspect.cleandoc(ast.get_docstring(function) or "").split("\n\n")[0]
    summary = " ".join(paragraph.split())
    if len(summary.split(" ")) < FEWEST_WORDS or len(summary) > MOST_CHARACTERS or not summary.endswith("."):
        return None
    return Documented(f"def {function.name}({ast.unparse(function.args)}):", summary)
