"""What is shown of texts and addresses holds no secret, and stays readable where there is none."""

from __future__ import annotations

import pytest

from trainables.results.credentials import may_hold_secret, redacted, secrets_of, shown

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "hush/hush+a", "AWS_SESSION_TOKEN": "hush-token-b", "GOOGLE_API_KEY": "hush-c",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=x;Account=hush-d", "WANDB_API_KEY": "hush-e", "HF_TOKEN": "hush-f",
    "MLFLOW_TRACKING_PASSWORD": "hush-g", "PGPASSWORD": "hush-h", "MYSQL_PWD": "hush-i", "MEBM_DB_PW": "hush-j",
    "db_password": "hush-k", "DATABASE_URL": "postgresql://joe:hush%2Fl@h/db?sslpassword=hush-m",
}  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_of_the_environment_are_in_no_text(monkeypatch, name):
    monkeypatch.setenv(name, SECRETS[name])
    hidden = secrets_of(SECRETS[name]) or {SECRETS[name]}
    for secret in hidden:
        text = redacted(f"refused ({secret}) at 5")
        assert text == "refused (***) at 5"
    assert redacted(SECRETS[name].replace("/", "%2F").replace("+", "%2B")).count("hush") == 0


def test_other_variables_are_no_secrets(monkeypatch, tmp_path):
    harmless = {
        "TOKENIZERS_PARALLELISM": "false", "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path), "PWD": str(tmp_path),
        "KEYBOARD": "qwertyuiop", "MEBM_CACHE": "/data/cache", "PGUSER": "joseph", "AWS_REGION": "eu-central-1",
    }  # fmt: skip
    for name, value in harmless.items():
        monkeypatch.setenv(name, value)
    text = " ".join(harmless.values())
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot open postgresql://joe:hush@h/db now", "cannot open postgresql://***@h/db now"),
        ("cannot open postgresql://joe:a?hu/sh#x@h/db", "cannot open postgresql://***@h/db"),
        ("s3:/KEY:hush@b/x: no such folder", "s3:/***@b/x: no such folder"),
        ("at h?PASSWD=hush&b=1", "at h?PASSWD=***&b=1"),
        ("user=joe password=hush host=h", "user=joe password=*** host=h"),
        ("connect(passwd='hu sh', host='h')", "connect(passwd=***, host='h')"),
        ("s3_secret_access_key = hush", "s3_secret_access_key = ***"),
        ("see http://host:8080/a and joe@example.org", "see http://host:8080/a and joe@example.org"),
        ("trial.lr=0.1 monkey=3 keys: a", "trial.lr=0.1 monkey=3 keys: a"),
    ],
)
def test_what_is_taken_out_of_a_text(text, expected):
    assert redacted(text) == expected


def test_the_secrets_of_an_address_are_taken_out_wherever_they_are():
    url = "mysql://joe:hu%2Fsh@h/db?passwd=pssst77&charset=utf8"
    assert secrets_of(url) == {"hu%2Fsh", "hu/sh", "pssst77"}
    assert redacted(f"{url}: hu/sh or pssst77 of joe is wrong", url) == "mysql://h/db: *** or *** of joe is wrong"
    assert may_hold_secret(url) and not may_hold_secret("mysql://joe@h/db?charset=utf8")


@pytest.mark.parametrize("url", ["x://[a:b@c", "x://a:b@c:notaport/d", "x://:@", "x://?", "x://@@:@#@?a=@"])
def test_addresses_that_nobody_can_read(url):
    assert isinstance(shown(url), str) and isinstance(redacted(url, url), str)
    assert may_hold_secret(url) is ("@" in url)
