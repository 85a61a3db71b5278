import json

import pytest
from PIL import Image

from splitq_jax.calib.jsonl import Jsonl
from splitq_jax.errors import InputError


def test_questions_of_ones_own(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    good = {"image": "a.png", "question": "What?", "answer": "A square"}
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(good) + "\n")
    data = Jsonl(file)
    assert data.count("train") == 2
    assert [r["image_id"] for r in data.records("train")] == [1, 3]
    assert data.records("train", [1])[0]["image"] == tmp_path / "a.png"
    file.write_text(json.dumps(good | {"question": "one\u2028two\u0085"}, ensure_ascii=False), encoding="utf-8")
    assert Jsonl(file).records("train")[0]["question"] == "one\u2028two\u0085"
    for line, message in (
        ("", "empty"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: a JSON list"),
        (json.dumps({"question": "What?", "answer": "x"}), "line 1: image is None.*needs an image"),
        (json.dumps(good | {"answer": " "}), "line 1: answer"),
        (json.dumps(good | {"image": "b.png"}), "line 1: image 'b.png' is no file"),
        (json.dumps(good | {"image": "https://x.org/a.png"}), "line 1: image"),
        (json.dumps(good | {"image": "a" * 300}), "is no file"),
        (json.dumps(good | {"question": "\ud800"}), "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
    ):
        file.write_text(line)
        with pytest.raises(InputError, match=message):
            Jsonl(file)
    with pytest.raises(InputError, match="cannot be read"):
        Jsonl(tmp_path / "none.jsonl")
