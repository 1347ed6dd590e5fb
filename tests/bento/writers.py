"""A tiny language model with random weights and adapters on it, for tests of everything around generation."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FIELDS = {
    "kind": {"type": "string", "enum": ["house", "flat"], "description": "What is for sale."},
    "furnished": {"type": "boolean"},
    "rooms": {"type": "integer", "enum": [1, 2, 3], "required": False},
}


def write_base(folder: Path, **sizes: int) -> str:
    """A Llama with random weights and a byte-level tokenizer of its own; the folder as text.

    Args:
        sizes: Of its configuration, beside or in place of `SIZES`.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=letters)
    tokenizer.train_from_iterator(["A house in the old town of Lund, 80 square metres, is for sale."], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    torch.manual_seed(1)
    sizes = {**SIZES, **sizes}
    config = transformers.LlamaConfig(vocab_size=len(fast), pad_token_id=0, eos_token_id=0, bos_token_id=0, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def write_adapter(folder: Path, base: str, *, task: str, seed: int, extraction: bool = False, **more: Any) -> Path:
    """An adapter folder as the trainer writes it, with random updates of visible size."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from ft_resources.base_models import resolve

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.normal_(0, 0.3)
    model.save_pretrained(str(folder))
    manifest = {
        "format": 1,
        "task": task,
        "type": "extraction" if extraction else "text-generation",
        "base": {"model": base, "digest": resolve(base).digest},
        "max_tokens": 128,
        **({"fields": FIELDS} if extraction else {}),
        **more,
    }
    (folder / "adapter.json").write_text(json.dumps(manifest))
    return folder


@contextmanager
def while_a_model_loads() -> Iterator[None]:
    """The default dtype of the process is bfloat16, as it is while transformers builds a model in another thread."""
    import torch

    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
