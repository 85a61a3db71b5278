"""A calibration set of one's own: a text file with one JSON object a line, ``{"image": "a.png", "question": "...", "answer": "..."}``."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from splitq_jax.errors import InputError

KEYS = ("image", "question", "answer")


class Jsonl:
    """Questions from a JSON-lines file; images are paths relative to it. It has no splits.

    Raises:
      InputError: a file that is missing or empty; a line that is no object with the three keys; an image that does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")  # `splitlines` cuts at characters that JSON allows in a text
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{self.path}: cannot be read ({e}); expected JSON lines with {', '.join(KEYS)}") from None
        self._records = [self._record(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
        if not self._records:
            raise InputError(f"{self.path}: the set is empty; give at least one line with {', '.join(KEYS)}")

    def _record(self, number: int, line: str) -> dict[str, Any]:
        where = f"{self.path}, line {number}"
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # half a character, as in "\\ud800", is none
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where}: not JSON ({e})") from None
        if not isinstance(value, dict):
            raise InputError(f"{where}: a JSON {type(value).__name__}; expected an object with {', '.join(KEYS)}")
        for key in KEYS:
            if not isinstance(value.get(key), str) or not value[key].strip():
                hint = "; text and vision are calibrated together, so a sample needs an image" if key == "image" else ""
                raise InputError(f"{where}: {key} is {value.get(key)!r}; expected a text{hint}")
        image = self.path.parent / value["image"]
        try:
            exists = "://" not in value["image"] and image.is_file()
        except OSError:  # a name that no file can have
            exists = False
        if not exists:
            raise InputError(f"{where}: image {value['image']!r} is no file; give a path relative to {self.path.parent}")
        return {"image": image, "image_id": number, "question": value["question"], "answer": value["answer"]}

    def count(self, split: str) -> int:
        """Return the number of images."""
        return len(self._records)

    def records(self, split: str, images: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """Return records like `easy_vqa.EasyVqa.records`; ``image`` is a path."""
        return self._records if images is None else [self._records[int(i)] for i in images]
