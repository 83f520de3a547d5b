"""What in a text or an address is nobody's business: passwords, keys and tokens. Standard library only.

Secrets belong into the environment, or into the files of whoever takes them (`~/.aws/credentials`, `~/.pgpass`). An
address that holds one is refused where it is given, and whatever is shown or kept goes through `redacted`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, unquote_plus

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_OPTION = re.compile(
    r"secret|pass|pwd|token|signature|credential|key|auth|connect(ion)?.?str|odbc|dsn|(?<![a-z])(sig|sas|pw)(?![a-z])",
    re.IGNORECASE,
)
"""In the name of a URL's option whose value may be one. It errs on the safe side: such an option is refused."""
_VARIABLE = re.compile(
    r"SECRET|PASSW|PASSPHRASE|TOKEN|CREDENTIAL|SIGNATURE|API_?KEY|CONNECTION_STRING"
    r"|(?<![A-Z])(PASS|PWD|PW|KEYS?|AUTH|SAS|DSN|PAT)(?![A-Z])",
    re.IGNORECASE,
)
"""In the name of an environment variable whose value may be one."""
_USER = re.compile(r"(:/{1,2})[^\s:/@'\"]*:\S*@")
"""A user with a password; a URL that was made a `Path` has one slash."""
_PAIR = re.compile(
    # Nothing before it and little behind it: a long text without any is passed over once.
    r"((?:passw(?:or)?d|passphrase|pwd|secret|token|signature|credential|(?:access|account|api|ssl|private)_?key)"
    r"[\w.%-]{0,100}\s{0,9}=\s{0,9})(?:'[^']*'|\"[^\"]*\"|[^\s&;,)'\"]+)",
    re.IGNORECASE,
)
_SHORTEST = 6
"""Characters of a value that is looked for; a shorter one is part of too many words."""


def is_url(text: object) -> bool:
    """True for a URL, false for a path. A URL that was made a `Path` has lost a slash and is none any more."""
    return isinstance(text, str) and _URL.match(text) is not None


def shown(url: object) -> str:
    """A URL as messages and logs may show it: without user, password, query and fragment. A path stays as it is."""
    text = str(url)
    if not is_url(text):
        return text
    scheme, _, rest = text.partition("://")
    before, at, after = rest.rpartition("@")
    if at and ":" in unquote(before):  # whatever stands before the last @ may be half of a password
        rest = after
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def may_hold_secret(url: str) -> bool:
    """Whether a URL has a password, or an option that may be one.

    An `@` in its path or query counts as the end of a password where a colon precedes it; it is written %40.
    """
    scheme, _, rest = url.partition("://")
    before, at, _ = rest.rpartition("@")
    if at and (":" in unquote(before) or scheme.lower() in ("http", "https")):
        return True
    return any(_OPTION.search(unquote(name)) or re.search(":.*@", unquote(value)) for name, value in _options(rest))


def _options(rest: str) -> Iterator[tuple[str, str]]:
    text = re.split(r"[?#]", rest, maxsplit=1)[1:]
    return iter(parse_qsl(re.sub("[#;?]", "&", text[0]), keep_blank_values=True) if text else ())


def secrets_of(url: str) -> set[str]:
    """The password, the key and the secret options of a URL, as they are written and as they are meant."""
    if not is_url(url):
        return set()
    scheme, _, rest = url.partition("://")
    before, at, _ = rest.rpartition("@")
    found: list[str] = []
    if at and ":" in before:
        user, _, password = before.partition(":")
        found += [password, *([user] if scheme in ("s3", "s3a") else [])]  # a key has two halves
    raw = re.split(r"[?#]", rest, maxsplit=1)[1:]
    for pair in re.split("[&;#?]", raw[0]) if raw else ():
        name, equals, value = pair.partition("=")
        if equals and _OPTION.search(unquote(name)):
            found.append(value)
    return {form for value in found for form in (value, unquote(value), unquote_plus(value)) if len(form) > 3}


def _of_environment() -> set[str]:
    """Values of this process's environment that are secret by the name of their variable, or stand in a URL."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if is_url(value):
            found |= secrets_of(value)
        elif _VARIABLE.search(name) and len(value) >= _SHORTEST and not _is_path(value):
            found.add(value)
    return found


def _is_path(value: str) -> bool:
    """Whether it names the file of a secret, or the working directory (PWD); a key may begin with a slash."""
    with suppress(OSError, ValueError):
        return value[0] in "/." and Path(value).exists()
    return False


def redacted(text: str, *urls: str) -> str:
    """A text without the secrets that can be told: of the environment, in URLs, and `password=...` and its like.

    Args:
        urls: whose credentials are taken out too, wherever the text has them.
    """
    known = _of_environment().union(*(secrets_of(url) for url in urls))
    for url in urls:
        text = text.replace(url, shown(url)) if is_url(url) else text
    for secret in sorted(known | {quote(s, safe="") for s in known}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _PAIR.sub(r"\1***", _USER.sub(r"\1***@", text))
