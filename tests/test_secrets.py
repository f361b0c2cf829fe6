"""What is hidden wherever text is written, and what is not: by value, by name, by shape."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote, quote_plus

import pytest
from turnwise.engine.util import secrets
from turnwise.engine.util.secrets import config_in_use, in_use, redact, redacted, url_in_use

S = "Hunter2Secret"
ODD = "co/rp\"gw=\\pä ss'wörd+1"


@pytest.fixture(autouse=True)
def _nothing_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_used", {})


@pytest.mark.parametrize("value", ["corpgw-plain-abcdef0123456789", ODD, "line\nbreak-in-it"])
def test_a_value_in_use_is_hidden_however_it_is_quoted(value: str) -> None:
    in_use(value + "\n")  # a line break at a key's end is no part of it, and prints the key
    said = [
        value,
        repr(value),
        repr(value + "\n"),
        json.dumps(value),
        json.dumps({"a": value}, ensure_ascii=False),
    ]
    said += [
        quote(value),
        quote(value, safe=""),
        quote_plus(value),
        repr(value.encode()),
        json.dumps(json.dumps(value)),
    ]
    said += [
        base64.b64encode(f"{user}:{value}".encode()).decode() for user in ("", "a", "bob", "user")
    ]
    for text in said:
        shown = redact(f"it said {text} to us")
        assert "***" in shown
        assert not any(part in shown for part in (value[2:8], value[-6:])), text


def test_a_value_that_a_message_cuts_off_is_hidden_too() -> None:
    key = "corpgw-abcdefghijklmnopqrstuvwxyz"
    in_use(key)
    assert redact(f"{{'message': 'bad key {key[:20]}") == "{'message': 'bad key ***"


def test_a_value_in_use_takes_no_ordinary_words_along() -> None:
    in_use("none", "", None, "passages")
    assert redact("none of the passages") == "none of the ***"
    assert redact("the passageside") == "the passageside"
    url_in_use("postgresql://turnwise:turnwise@host/turnwise")
    assert redact("turnwise run --resume") == "turnwise run --resume"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://bob:{S}@h/db", f"postgresql://bob:{S}/x@h/db", f"postgresql://bob:a {S}@h/db", f"postgresql://bob:p:{S}@h/db",  # noqa: E501
        f"postgresql://:{S}@h/db", f"postgresql://bob:a@{S}@h/db", f"postgresql://bob:a?{S}#x@h/db", f"redis://:{S}@h:6379/0",  # noqa: E501
        f"postgresql+psycopg://h/db?user=bob&password={S}", f"https://{S}@host/v1", f"https://host/v1?api_key={S}",
        f"https://host/v1?key={S}&x=1", f"https://host/v1?x=1&sig={S}", f"git+https://{S}@github.com/a/b", f"amqp://u:{S}%2F@h//",  # noqa: E501
        f"mongodb+srv://u:{S}@c.example.net/?retryWrites=true", f"https://host/cb#access_token={S}&x=1",
    ],
)  # fmt: skip
def test_urls_keep_their_secrets(url: str) -> None:
    assert S not in redact(url)
    assert S not in redact(f"cannot reach {url!r}: refused")
    assert S not in str(redacted({"ledger": url}))
    url_in_use(url)
    used = list(secrets._used)
    assert used
    assert all(each not in redact(f"FATAL: no {each} of bob") for each in used)


NAMES = """api_key apiKey API-KEY apikey APIKEY OPENAI_API_KEY accessKey access_key accessKeyId \
aws_secret_access_key secretKey clientSecret client_secret
authToken auth_token auth pwd passwd passphrase bearer cookie Set-Cookie x-auth X-Auth-Token \
Authorization Proxy-Authorization
Ocp-Apim-Subscription-Key private_key key_id sas sasToken connection_string connectionString dsn \
sentryDsn webhook webhook_url session session_id
credential credentials_json creds token_value tokens keys api_keys apiKeys secrets passwords \
password db_password dbPassword refreshToken hf_token
HF_TOKEN id_token jwt x-goog-api-key encryption_key signingKey license_key account_key \
userPassword SECRET secret_key_base""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", NAMES)
def test_names_of_secrets_in_every_spelling(name: str) -> None:
    assert redacted({name: S}) == {name: "***"}
    assert S not in str(redacted({"headers": [[name, S]], "options": {"deep": [{name: S}]}}))
    for text in (
        f"{name}={S}",
        f"'{name}': '{S}'",
        json.dumps(json.dumps({name: S})),
        f"{name}: {S}",
        f"f(x=1, {name}={S!r})",
    ):
        assert S not in redact(text), text


def test_what_stands_under_a_name_of_secrets() -> None:
    assert redacted({"api_keys": {"openai": "a", "other": ["b"]}}) == {
        "api_keys": {"openai": "***", "other": ["***"]}
    }
    assert redacted({"headers": [["Authorization", "x y"]]}) == {
        "headers": [["Authorization", "***"]]
    }
    assert redacted({"name": "X-Api-Key", "value": "v"}) == {"name": "X-Api-Key", "value": "***"}
    command = ["x", "--api-key", "a1b2c3d4e5f6", "--max-tokens", "512"]
    assert redacted({"cmd": command}) == {"cmd": ["x", "--api-key", "***", "--max-tokens", "512"]}
    assert redacted({"token": 123456789, "api_key": 123456789, "tokens": 123456789}) == {
        "token": "***", "api_key": "***", "tokens": 123456789,
    }  # fmt: skip
    assert redacted({"password": 12345678}) == {"password": "***"}


SHAPES = [
    f"Bearer {S}", f"Bearer abc|{S}", f"bearer {S}", f"Authorization: Basic {S}==",
    f"x-api-key: {S}", f"Cookie: a=b; sid={S}; c=d",
    f"sk-ant-api03-{S}", f"sk-proj-{S}", f"AIzaSy{S}abcdefghijklmnop", f"xoxb-123456789012-{S}",
    f"glpat-{S}abcdefg", f"github_pat_11ABC{S}",
    f"ghp_{S}abcdefghijkl", f"eyJhbGciOi.eyJzdWIi.{S}", f"gsk_{S}abcdefghij", f"pk-lf-{S}",
    f"r8_{S}abcdefgh", f"AKIA{S.upper()}",
    f"https://hooks.slack.com/services/T0/B0/{S}", f"wandb_v1_{S}", f"hf_{S}abcdef",
    f"npm_{S}abcdefghij", f"sk_live_{S}abcdef",
    f"whsec_{S}abcdef", f"https://discord.com/api/webhooks/1/{S}", f"hvs.{S}abcdefghijkl",
    f"xai-{S}abcdefghij", f"nvapi-{S}abcdef",
    f"SG.{S}abcdef.{S}abcdef", f"GOCSPX-{S}abcdef", f"dop_v1_{S}abcdef", f"ya29.{S}abcdefg",
    f"the API key provided: {S}.",
    f"-----BEGIN RSA PRIVATE KEY-----\nMIIE{S}\n-----END RSA PRIVATE KEY-----",
    f"-----BEGIN PRIVATE KEY-----\\nMIIE{S}",
]  # fmt: skip


@pytest.mark.parametrize("text", SHAPES)
def test_shapes_of_secrets(text: str) -> None:
    assert S.lower() not in redact(text).lower()
    assert S.lower() not in redact(f"it said ({text})").lower()


ORDINARY = [
    "the monkey and the tokens stay", "max_tokens=512, new_tokens: 40", "keyboard: qwertz",
    "{'prompt_tokens': 12, 'total_tokens': 40}",
    "no answer: keys: a, b", "a token: expected ','", "bearer of bad news",
    "Basic instructions were followed", "auth: failed",
    "an unknown key: 'city'", "session: closed", "the secret of success",
    "http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/@user",
    "postgresql://bob@host/database", "https://medium.com/@user/post",
    "see postgresql://host:5432/db, or write to bob@example.com",
    "sk-learn is a library", "tokens per second: 55.2", "2026-11-29T01:42:00", "eos_token=</s>",
    "sort_key='episode_id'",
    "C:\\keys\\x", "git clone ssh://git@github.com/a/b", "turnwise run x.yaml --resume",
    "episode e-1a2b3c4d5e6f7a8b9c0d",
    "https://example.org/a?page=2&sort=key", "the password is wrong", "Bearer token is missing",
    "author: Bob", "authority=7",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_words_and_numbers_stay(text: str) -> None:
    assert redact(text) == text


def test_ordinary_options_stay() -> None:
    plain = {
        "max_tokens": 512, "max_new_tokens": "512", "tokens": 1234, "keyboard": "de", "monkey": "x",
        "eos_token": "</s>", "tokenizer": "gpt2",
        "keys": ["city", "name"], "tokens_per_second": 5.5, "sort_key": "id", "author": "Bob",
        "api_key_env": "OPENAI_API_KEY", "passed": True,
        "token_ids": [1, 2], "key_file": "/etc/k.pem", "sessions": 3, "auth_type": "basic",
        "pass_rate": "0.5", "secret_name": "prod",
        "compass": "north", "keyword": "please", "passage": "text",
        "url": "http://localhost:8000/v1", "password": None, "token": False,
    }  # fmt: skip
    assert redacted(plain) == plain


def test_redacting_twice_changes_nothing_more() -> None:
    for text in [*SHAPES, *(f"{name}: {S}, 'x'" for name in NAMES)]:
        assert redact(redact(text)) == redact(text)


def test_the_secrets_of_a_config_are_in_use() -> None:
    config_in_use(
        {
            "stages": [{"rl": {"feedback": [{"judge": "x", "clientSecret": "abcd-efgh"}]}}],
            "ledger": f"postgresql://b:{S}/@h/d",
        }
    )
    assert redact(f"abcd-efgh and {S}/ came back") == "*** and *** came back"


def test_the_environments_secrets_are_hidden_but_not_its_paths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACME_CLIENT_SECRET", "plain looking value")
    monkeypatch.setenv("DATABASE_URL", "postgresql://b:in-the-url@h/d")
    monkeypatch.setenv("PWD", "/srv/here")
    monkeypatch.setenv("DESKTOP_SESSION", "gnome-classic")
    monkeypatch.setenv("MYSQL_PWD", "/Slash99pass")
    monkeypatch.setenv("PGPASSWORD", "libpqs own one")
    monkeypatch.setenv("KEY_OPENAI", "corpgw1a2b3c4d")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/agent.12")
    assert (
        redact("/Slash99pass; libpqs own one; corpgw1a2b3c4d; /tmp/agent.12")
        == "***; ***; ***; /tmp/agent.12"
    )
    assert (
        redact("plain looking value; in-the-url; /srv/here; gnome-classic")
        == "***; ***; /srv/here; gnome-classic"
    )


def test_long_texts_are_read_quickly() -> None:
    for part in ("a", "key=", "://a:", "sk-", "api key ", "\\", "'", "eyJ.", "a" * 70 + " "):
        redact(part * (100_000 // len(part)))
