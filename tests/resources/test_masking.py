"""Secrets by name, by form and by value; and what only looks like one stays readable."""

import pytest

from ft_resources.masking import MASK, is_secret_name, mask, mask_text, secrets_of

NONE: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    "name",
    [
        "FT_API_KEYS",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWORD",
        "MYSQL_PWD",
        "FT_NOTIFY_URL",
        "apiKey",
        "db.password",
        "auth",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "tokens_per_second",
        "pad_token",
        "eos_token_id",
        "TOKENIZERS_PARALLELISM",
        "PWD",
        "OLDPWD",
        "SSH_AUTH_SOCK",
        "partition_key",
        "monkey",
        "compass",
    ],
)
def test_names_that_only_look_so(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "secret",
    [
        "sk-" + "proj-" + "a1B2" * 8,
        "sk-" + "ant-api03-" + "x_Y-" * 8,
        "ghp" + "_" + "a1B2" * 9,
        "github" + "_pat_" + "11AB" * 8,
        "glpat" + "-" + "a1B2-" * 4,
        "hf" + "_" + "aBcD" * 8,
        "AKIA" + "ABCD2345" * 2,
        "AIza" + "Sy0_-" * 7,
        "xoxb" + "-1234567890-abcdef",
        "npm" + "_" + "a1B2" * 9,
        "https://hooks.slack.com" + "/services/T0AB/B0CD/a1B2c3",
        "eyJ" + "hbGciOiJI" + ".eyJ" + "zdWIiOiIx" + ".c2ln_bmF0dXJl",
    ],
)
def test_known_forms_of_keys(secret: str) -> None:
    assert mask_text(f"asked with {secret}, refused", NONE) == f"asked with {MASK}, refused"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql+psycopg2://ft:s3cr:et@db/ledger", f"postgresql+psycopg2://ft:{MASK}@db/ledger"),
        ("redis://:pw@cache:6379/0", f"redis://:{MASK}@cache:6379/0"),
        ("Authorization: Bearer abc.def-ghi=", f"Authorization: Bearer {MASK}"),
        ("password=hunter2, next", f"password={MASK}, next"),
        ('{"api_key": "abc", "rank": 4}', f'{{"api_key": "{MASK}", "rank": 4}}'),
        ("GET /rows?token=abc&page=2", f"GET /rows?token={MASK}&page=2"),
        ("run --db-password hunter2 --rank 4", f"run --db-password {MASK} --rank 4"),
    ],
)
def test_secrets_by_where_they_stand(text: str, masked: str) -> None:
    assert mask_text(text, NONE) == masked


@pytest.mark.parametrize(
    "text",
    [
        "step 3/40, 812 tokens: 4.1 s, token limit 128",
        "commit 35a3f8ad11bd56b1e525544b306956b379226c78",
        "http://127.0.0.1:3000/readyz and s3://bucket/path@1",
        "mail from ann@example.org at 12:30",
        "encoder-lora@1, lr 1e-3, max_tokens: 128",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert mask_text(text, NONE) == text


def test_a_private_key_goes_whole() -> None:
    key = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA " + "PRIVATE KEY-----"
    assert mask_text(f"before\n{key}\nafter", NONE) == f"before\n{MASK}\nafter"
    assert "MIIEow" not in mask_text(key[:50], NONE)  # cut off


def test_values_of_variables_are_hidden_wherever_they_occur() -> None:
    variables = {
        "FT_API_KEYS": "first-key-value, second-key-value",
        "HF_TOKEN": "plainword",
        "DB_PASSWORD": "test",
        "FT_LEDGER": "postgresql://ft:p%40ss-of-db@host/x",
        "USE_TOKEN": "true",
        "HOME": "/root/home",
    }
    secrets = secrets_of(variables)
    text = "second-key-value|xplainwordx|p@ss-of-db|test test_split true /root/home"
    assert mask_text(text, secrets) == f"{MASK}|x{MASK}x|{MASK}|{MASK} test_split true /root/home"


def test_a_tree_keeps_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "from-the-environment")
    tree = {
        "base": {"max_tokens": 128, "token": "abc", "use_auth_token": False},
        "sources": [{"url": "https://u:pw1@host/x"}, "from-the-environment"],
        "password": 1234,
        "credentials": {"user": "a", "id": "b"},
        "secret": None,
    }
    assert mask(tree) == {
        "base": {"max_tokens": 128, "token": MASK, "use_auth_token": False},
        "sources": [{"url": f"https://u:{MASK}@host/x"}, MASK],
        "password": MASK,
        "credentials": MASK,
        "secret": None,
    }
