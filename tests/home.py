"""A folder with a tiny model, its tokenizer, four pictures and a set of questions."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import CONFIG, model_and_params
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from splitq_jax import models

IMAGE, END = 90, 1
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ c['text'] }}{% endif %} {% endfor %}<end> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}


def make(root: Path) -> Path:
    """Fill ``root`` with ``model``, ``set.jsonl`` and its pictures."""
    words = ["<unk>", "<end>", ":", "user", "assistant", "what", "is", "this", "red", "blue"]
    vocabulary = {w: i for i, w in enumerate(words)} | {f"w{i}": i for i in range(len(words), IMAGE)} | {"<image>": IMAGE}
    base = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, unk_token="<unk>", eos_token="<end>", pad_token="<unk>", extra_special_tokens=["<image>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "tokenizer")
    files = {f.name: f.read_bytes() for f in (root / "tokenizer").iterdir()}
    files["preprocessor_config.json"] = json.dumps(PREPROCESSOR).encode()
    models.export(root / "model", CONFIG, model_and_params()[1], files)
    lines = []
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)).save(root / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": "what is this", "answer": "red" if i % 2 else "blue"})
    (root / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root
