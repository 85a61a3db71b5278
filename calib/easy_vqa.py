"""easy-VQA (MIT, PyPI ``easy-vqa``) as a tensorflow-datasets builder: array_record files, read without TensorFlow.

An example is an image with all its questions. ``validation`` is the last tenth of the package's training images: choose settings
there, report on ``test``.
"""

import fcntl
import importlib.util
import json
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from splitq_jax.errors import InputError

LOCK = ".easy_vqa.lock"
SPLITS = {"train": 3600, "validation": 400, "test": 1000}  # images; the package's 4,000 training images are shared by the first two


def package_data() -> Path:
    """Return the folder of the package's images and questions.

    Raises:
      InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise InputError("easy-VQA: the package is not installed; run: pip install easy-vqa==1.0")
    return Path(spec.origin).parent / "data"


@cache
def _builder_class() -> Any:
    # tensorflow-datasets takes a second to import
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc, unused-ignore]
        """Synthetic 64 x 64 images of one shape, with questions about shape and colour."""

        name = "easy_vqa"
        VERSION = tfds.core.Version("1.0.0")
        RELEASE_NOTES = {"1.0.0": "The package's images and questions."}  # noqa: RUF012

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="easy-VQA: one coloured shape an image, questions with 13 answers.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(64, 64, 3)),
                        "image_id": np.int64,
                        "questions": tfds.features.Sequence(tfds.features.Text()),
                        "answers": tfds.features.Sequence(tfds.features.Text()),
                    }
                ),
                homepage="https://github.com/vzhou842/easy-VQA",
            )

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            folder = package_data() / ("test" if split == "test" else "train")
            asked: dict[int, list[tuple[str, str]]] = {}
            for question, answer, image_id in json.loads((folder / "questions.json").read_text()):
                asked.setdefault(image_id, []).append((question, answer))
            for image_id, pairs in sorted(asked.items()):
                if split != "test" and (image_id < SPLITS["train"]) != (split == "train"):
                    continue
                yield (
                    image_id,
                    {
                        "image": checked_png(folder / "images" / f"{image_id}.png"),
                        "image_id": image_id,
                        "questions": [q for q, _ in pairs],
                        "answers": [a for _, a in pairs],
                    },
                )

    return Builder


def checked_png(path: Path) -> Image.Image:
    """Open an image as RGB.

    Raises:
      InputError: a file that is missing or not an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise InputError(f"{path}: not a readable image ({error}); install easy-vqa anew") from None


def build(data_dir: str | Path) -> Any:
    """Write the array_record files (once) under ``data_dir`` and return the builder."""
    make = partial(_builder_class(), data_dir=str(data_dir), file_format="array_record")
    builder = make()
    if not Path(builder.data_dir).exists():
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with (Path(data_dir) / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two that build at once one would fail
            builder = make()  # anew: the other one may have built it meanwhile
            builder.download_and_prepare()
    return builder


class EasyVqa:
    """The data set, built under ``data_dir`` when it is first read."""

    def __init__(self, data_dir: str | Path) -> None:
        self.data_dir = Path(data_dir)

    def count(self, split: str) -> int:
        """Return the number of a split's images.

        Raises:
          InputError: an unknown split.
        """
        if split not in SPLITS:
            raise InputError(f"easy-VQA: split {split!r}; expected one of {', '.join(SPLITS)}")
        return SPLITS[split]

    def records(self, split: str, images: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """Return one record a question: ``image`` (64, 64, 3) uint8, shared by the image's questions, ``image_id``, ``question``, ``answer``.

        Args:
          split: ``train``, ``validation`` or ``test``.
          images: which images of the split, by index; None for all.

        Raises:
          InputError: an unknown split; an image that is damaged.
        """
        count = self.count(split)
        source = build(self.data_dir).as_data_source(split)
        out = []
        for i in range(count) if images is None else images:
            try:
                example = source[int(i)]
            except (ValueError, OSError, SyntaxError) as error:
                raise InputError(f"easy-VQA {split}[{i}]: damaged ({error}); delete {self.data_dir} to build it anew") from None
            for question, answer in zip(example["questions"], example["answers"], strict=True):
                pair = {"question": question.decode(), "answer": answer.decode()}
                out.append({"image": example["image"], "image_id": int(example["image_id"]), **pair})
        return out
