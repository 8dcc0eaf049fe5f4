"""A checkpoint with a tokenizer and a chat template, small and whole."""

import dataclasses
import json

from tests.helpers import SMALL, random_model
from zamba2_jax import save_hf
from zamba2_jax.text.vocabulary import save_tokenizer, train_tokenizer

TEXT = "the cat and the hat and the bat and the rat in the flat sat on the mat on which the dog had sat "
CONFIG = dataclasses.replace(SMALL, vocab_size=290, tie_embeddings=False)
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


def write_checkpoint(directory, template=TEMPLATE):
    save_hf(random_model(CONFIG), directory)
    save_tokenizer(train_tokenizer([TEXT], 290), directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return directory
