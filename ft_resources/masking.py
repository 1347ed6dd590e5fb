"""Hiding secrets in what is written for people: by the name they stand under, by their form, and by their value."""

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

MASK = "***"
SECRET_WORDS = {"apikey", "credential", "credentials", "key", "keys", "pass", "passphrase", "passwd", "password", "pat"}
SECRET_WORDS |= {"passwords", "secret", "secrets", "token", "auth", "authorization", "bearer", "cookie", "webhook"}
ENDINGS = ("password", "passwd", "secret", "apikey", "token")
ENDS = ("_pwd", "notify_url")
HARMLESS_NAMES = re.compile(
    r"(?i)(^|[_.-])((pad|eos|bos|unk|cls|sep|mask|image|stop|special)_?token|token_?(accuracy|count|type)|auth_?(type|method|sock)"
    r"|(public|partition|asset|primary|foreign|sort|group|row|label|text)_?keys?)($|[_.-])"
)
"""Names with a word of `SECRET_WORDS` that hold none."""
SHORTEST = 8
"""A shorter value is hidden only where it stands as a word of its own."""

_NAME = r"[A-Za-z0-9_.-]*(?:password|passwd|passphrase|secret|token|api_?-?key|access_?-?key|private_?-?key|credential)"
_FORMS = [
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"),  # JSON web token
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),  # OpenAI, Anthropic and services after their model
    re.compile(r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{20,}"),
    re.compile(r"\bglpat-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),  # AWS
    re.compile(r"\bAIza[0-9A-Za-z_-]{30,}"),  # Google
    re.compile(r"\bya29\.[0-9A-Za-z_-]{20,}"),
    re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),  # Slack
    re.compile(r"https://hooks\.slack\.com/(?:services|workflows|triggers)/[\w/-]+"),
    re.compile(r"\b(?:npm_|dapi|r8_|nvapi-|gsk_|pypi-AgE)[A-Za-z0-9_-]{24,}"),
]
_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)([^/\s:@'\"]*):([^/\s'\"]+)@", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic)(\s+)([A-Za-z0-9._~+/=-]{8,})", re.IGNORECASE)
_NAMED = re.compile(rf"(?i)(?<![\w])({_NAME})(\"?'?\s*[:=]\s*[\"']?)([^\s\"',;&]+)")
_OPTION = re.compile(rf"(?i)(--{_NAME})(\s+)([^\s-][^\s]*)")


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of this name holds a secret: `FT_API_KEYS` does, `max_tokens` does not."""
    if HARMLESS_NAMES.search(name):
        return False
    plain = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
    words = re.split(r"[^a-z]+", plain)
    return not SECRET_WORDS.isdisjoint(words) or any(word.endswith(ENDINGS) for word in words) or plain.endswith(ENDS)


def secrets_of(variables: Mapping[str, str]) -> frozenset[str]:
    """Values to hide wherever they occur: of variables with a secret's name, and the passwords in URLs of any."""
    found: set[str] = set()
    for name, value in variables.items():
        if is_secret_name(name):
            found |= {value.strip(), *(part.strip() for part in value.split(","))}
        for match in _URL.finditer(value):
            found |= {match[3], unquote(match[3])}
    return frozenset(value for value in found if len(value) > 3 and value.lower() not in ("true", "false", "none"))


def mask_text(text: str, secrets: frozenset[str] | None = None) -> str:
    """`text` with `***` in the place of every secret that can be told.

    Args:
        secrets: Values that are secret whatever they look like; default those of this process's variables.
    """
    for form in _FORMS:
        text = form.sub(MASK, text)
    values = _values(secrets_of(os.environ) if secrets is None else secrets)
    if values is not None:
        text = values.sub(MASK, text)
    text = _URL.sub(rf"\1\2:{MASK}@", text)
    text = _BEARER.sub(rf"\1\2{MASK}", text)
    text = _NAMED.sub(rf"\1\2{MASK}", text)
    return _OPTION.sub(rf"\1\2{MASK}", text)


def mask(value: Any, secrets: frozenset[str] | None = None) -> Any:
    """`value`, of mappings, lists and scalars, with secrets hidden in texts and below keys with a secret's name."""
    known = secrets_of(os.environ) if secrets is None else secrets
    if isinstance(value, Mapping):
        return {
            mask_text(str(key), known): MASK if is_secret_name(str(key)) and _tells(one) else mask(one, known)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [mask(one, known) for one in value]
    return mask_text(value, known) if isinstance(value, str) else value


def _tells(value: Any) -> bool:
    """Whether there is something to hide: a number under `password` is one, a switch or nothing is not."""
    return value not in (None, "", [], (), {}) and not isinstance(value, bool)


@lru_cache(maxsize=8)
def _values(secrets: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted(secrets, key=lambda value: (-len(value), value))
    patterns = [re.escape(v) if len(v) >= SHORTEST else rf"(?<!\w){re.escape(v)}(?!\w)" for v in longest_first]
    return re.compile("|".join(patterns)) if patterns else None
