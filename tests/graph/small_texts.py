"""Small tasks that write text, on a tiny decoder with random weights and a tokenizer of their own words."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = {
    "cold": ["ice", "snow", "winter", "frost", "glacier", "sleet"],
    "warm": ["sun", "summer", "beach", "fire", "desert", "lava"],
}
FILLING = ["morning", "valley", "river", "harbour", "old town", "north road", "market", "bridge", "hill", "garden"]
COMMON = """
recipe: chat-lora@1
overrides:
  base: {{model: {base}, max_tokens: 400}}
  lora: {{rank: 16, alpha: 32}}
  training: {{epochs: {epochs}, batch_size: 8, learning_rate: 0.01, precision: fp32}}
sources:
  - {{kind: files, url: rows.jsonl}}
cleaning: {{near_duplicates: 1.0}}
split: {{cluster_similarity: 1.0}}
gates:
  non_inferiority_margin: 0.3
  forgetting_margin: 0.45
  min_test_rows: 10
"""
ANSWERS = """
name: small-answers
type: text-generation
description: How the weather is.
system: Say how it is.
"""
GENERAL = "  max_loss_increase: 30\n"
FIELDS = """
name: small-fields
type: extraction
description: The weather in fields.
fields:
  weather: {type: string, enum: [cold, warm]}
  windy: {type: boolean}
  place: {type: string, required: false}
"""


def tiny_chat(folder: Path) -> Path:
    """A decoder with random weights, 2 layers of 64, and a byte-level tokenizer with a chat template."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([json.dumps(row) for row in [*answer_rows(200), *field_rows(200)]], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answer_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions about places, answered by what their words tell."""
    return [
        {"text": f"How is it: {text}?", "label": f"It is {weather} there." + (" Mind the wind." if windy else "")}
        for text, weather, windy, _ in _sentences(count, seed)
    ]


def field_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Documents with the values of the fields."""
    return [
        {"text": text, "label": json.dumps({"weather": weather, "windy": windy, "place": place})}
        for text, weather, windy, place in _sentences(count, seed)
    ]


def write_texts(
    folder: Path, base: Path, head: str, rows: list[dict[str, str]], *, epochs: int, more: str = ""
) -> Path:
    """A task file with its rows beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "task.yaml"
    path.write_text(head.lstrip() + COMMON.lstrip().format(base=base, epochs=epochs) + more, encoding="utf-8")
    return path


def _sentences(count: int, seed: int) -> list[tuple[str, str, bool, str | None]]:
    chance = random.Random(seed)
    found = {}
    while len(found) < count:
        weather = chance.choice(["cold", "warm"])
        windy, place = chance.random() < 0.5, chance.choice([*FILLING[:4], None])
        words = chance.sample(WORDS[weather], 3) + ["storm"] * windy + [f"at the {place}"] * (place is not None)
        chance.shuffle(words)
        found[" ".join(words)] = (" ".join(words), weather, windy, place)
    return list(found.values())
