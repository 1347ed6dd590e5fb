"""What a model is given to read: conversations and documents as token ids, written as the training rows were."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bento.conversation import (
    ALPACA_TEMPLATE,
    Message,
    dump,
    extraction_messages,
    load,
    prepare_conversation,
    with_system,
)
from bento.generation.interface import Adapter
from bento.generation.manifest import GenerationManifest
from bento.preparation import prepare
from ft_resources.base_models import BaseModel
from ft_resources.errors import DataError, RequestError, ServiceError


class Prompts:
    """The tokenizer and chat template of one base model. Safe in any thread.

    Raises:
        ServiceError: The base model has no fast tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._template: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            serialised = self._template.backend_tokenizer.to_str()
        except (OSError, ValueError, AttributeError) as error:
            raise ServiceError(
                f"the base model's tokenizer cannot be loaded: {error}",
                where=str(folder),
                mend="Save a fast tokenizer there with transformers' save_pretrained.",
            ) from error
        self.tokenizer: Tokenizer = Tokenizer.from_str(serialised)  # its own: padding and cutting are never switched on
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.end: int | None = self._template.eos_token_id

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special`: with what the tokenizer puts around a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def conversation(self, messages: Sequence[Message], manifest: GenerationManifest | None) -> list[int]:
        """See `TextGenerator.prompt`."""
        try:
            if manifest is None:
                complete = load(dump(messages))
            else:
                how = manifest.preparation
                text = dump(with_system(messages, manifest.system))
                complete = load(prepare_conversation(text, how.pii, how.max_chars)[0])
        except DataError as error:
            raise _invalid(error) from None
        return self._written(complete)

    def extraction(self, document: str, manifest: GenerationManifest) -> list[int]:
        """See `TextGenerator.prompt_extraction`."""
        if manifest.type != "extraction":
            raise RequestError(
                "invalid_request",
                f"task '{manifest.task}' extracts nothing, it answers conversations",
                mend="Send messages.",
            )
        how = manifest.preparation
        prepared = prepare(document, how.pii, how.max_chars)[0]
        if not prepared:
            raise RequestError("invalid_request", "nothing is left of the document", mend="Send a text.")
        return self._written(extraction_messages(prepared, manifest.fields, manifest.instruction))

    def _written(self, messages: Sequence[Message]) -> list[int]:
        rendered: str = self._template.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=True,
            chat_template=self._template.chat_template or ALPACA_TEMPLATE,
        )
        return self.tokens(rendered, special=False)


class Prompting:
    """What every engine of `interface.TextGenerator` does before it computes: from what is asked to token ids."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._prompts = Prompts(base.path)

    def prompt(self, messages: Sequence[Message], adapter: Adapter | None) -> list[int]:
        """See `interface.TextGenerator`."""
        return self._prompts.conversation(messages, adapter.manifest if adapter else None)

    def prompt_extraction(self, document: str, adapter: Adapter) -> list[int]:
        """See `interface.TextGenerator`."""
        return self._prompts.extraction(document, adapter.manifest)

    def tokens(self, text: str) -> list[int]:
        """See `interface.TextGenerator`."""
        return self._prompts.tokens(text)


def _invalid(error: DataError) -> RequestError:
    return RequestError("invalid_request", f"{error.where}: {error.what}", mend=error.mend)
