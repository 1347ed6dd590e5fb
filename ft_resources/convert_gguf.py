"""GGUF to a folder of safetensors, configuration and tokenizer: `python -m ft_resources.convert_gguf FILE FOLDER`.

Weights are dequantised to float32 and stored as bfloat16. That rounds each by at most 1/512 of itself, where the steps
of a four-bit block are 1/15 of the block's range; it is also what matrix products in bfloat16 would round to.
"""

import sys
from pathlib import Path

CONVERTER_VERSION = "1"
"""Part of a converted model's digest; another one converts anew."""


def convert(source: Path, target: Path) -> None:
    """Write the model in `source` to the empty folder `target`, in the form that `save_pretrained` has.

    Tied embeddings stay tied; the tokenizer keeps its chat template and its end-of-turn token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # a model with it refuses to be saved or cast, although its weights are plain by now
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.to_empty(device="cpu")
    plain.tie_weights()
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
