"""Addresses of databases in a configuration: without secrets, which are taken from the environment."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote, unquote_plus

from study.config.errors import UserError

_NAME = re.compile(r"\$\{(\w+)\}")
_FILLED = "\ue000"
"""Stands for a `${NAME}` while an address is looked at; no address has the character."""
_HARMLESS = frozenset({
    "application_name", "cache", "charset", "client_encoding", "connect_timeout", "gssencmode", "host", "hostaddr",
    "isolation_level", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "mode", "port",
    "read_default_file", "read_default_group", "read_timeout", "service", "ssl", "ssl_ca", "ssl_check_hostname",
    "ssl_disabled", "ssl_mode", "ssl_verify_cert", "ssl_verify_identity", "sslcrl", "sslmode", "sslrootcert",
    "sslsni", "target_session_attrs", "tcp_user_timeout", "timeout", "unix_socket", "uri", "use_unicode",
    "write_timeout",
})  # fmt: skip
"""Options of the database drivers that hold no secret. Of any other nobody knows."""
_ADVICE = (
    "${NAME} in its place takes it from the environment (so may the whole address be); "
    "libpq's ~/.pgpass and MySQL's read_default_file hold one too"
)


def check_address(address: str) -> str:
    """The address; one that holds a secret, which would stand in the study's files, is refused.

    Secret are a password and whatever an option other than the harmless ones says. They are told from the rest by the
    way SQLAlchemy reads an address, on the safe side: all before the last `@` may be user and password. The ValueError
    does not repeat them.
    """
    text = _NAME.sub(_FILLED, address)
    if text == _FILLED:
        return address
    scheme, separator, rest = text.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][\w+.]*", scheme):
        raise ValueError("must be the address of a database, DIALECT+DRIVER://USER@HOST/DATABASE, or ${NAME} for one")
    before, at, place = rest.rpartition("@")
    _, colon, password = unquote(before).partition(":")
    path, _, query = place.partition("?")
    port = path.partition("/")[0].rpartition("]")[2].partition(":")[2]
    if (at and colon and password != _FILLED) or not re.fullmatch(rf"\d*|{_FILLED}", port):
        raise ValueError(f"holds a password, which would stand in the study's files; {_ADVICE}")
    if set(unquote(path)) & set("=;&#"):
        raise ValueError(f"has '=', ';', '&' or '#' before its options, where no secret may stand; {_ADVICE}")
    for pair in filter(None, re.split("[&;#?]", query)):
        name, _, value = pair.partition("=")
        if value == _FILLED and re.fullmatch(r"\w+", name):
            continue
        harmless = unquote_plus(name).strip().lower() in _HARMLESS
        if not harmless or not re.fullmatch(rf"[\w .,:/+~%\[\]{_FILLED}-]*", unquote_plus(value)):
            raise ValueError(f"has an option that may hold a secret, which would stand in the study's files; {_ADVICE}")
    return address


def filled(address: str) -> str:
    """An address with its `${NAME}`s replaced by what the environment has. UserError: a variable that is not set.

    What stands for a user, a password or an option is quoted: half of a password with an @ or a / in it would count as
    the host, and be named in an error.
    """

    def value(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in os.environ:
            raise UserError(f"search.storage: the environment variable {name} is not set")
        return os.environ[name]

    def quoted(found: re.Match[str]) -> str:
        return quote(value(found), safe="")

    before, at, place = address.rpartition("@")
    path, mark, query = place.partition("?")
    return f"{_NAME.sub(quoted, before)}{at}{_NAME.sub(value, path)}{mark}{_NAME.sub(quoted, query)}"
