"""API keys at rest: who holds which key, as hashes, and how much each tenant may ask for.

Flow: `distill keys add` -> `new_key` -> the text is shown once, its hash goes into the file -> the gateway reads the file (access.py).
Unit of data: one key. Its text is `dsk_ID_SECRET`: the id finds the entry and is no secret; the secret is 256 random bits. That is why one
SHA-256 is enough: slow hashes (scrypt, argon2) protect what people choose, nobody guesses 256 random bits, and one slow hash a request
would be a way to overload the gateway.

    keys:                                   # a YAML file, or JSON, which is YAML too
      - {id: 0f1e2d3c4b5a, tenant: alice, sha256: 64 hex digits, created: 2026-01-31}
    tenants:                                # only those whose quota is not server.quota, and of it only what differs
      alice: {images_per_s: 500, weight: 3}
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from distill.config import Section, validate
from distill.errors import ConfigError
from teacher_server.settings import TenantQuota

TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]

_KEY = re.compile(r"dsk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})", re.ASCII)
_LARGEST_FILE = 16 * 2**20
_HEAD = (
    "# API keys of the gateway, as SHA-256 hashes: the keys themselves are nowhere. Changed by `distill keys`; a running gateway notices.\n"
)


class KeyEntry(Section):
    """One key, as it is kept."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    """Names the key in lists and when it is revoked."""
    tenant: TenantName
    """Whose it is."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the secret."""
    created: datetime.date | None = None
    """The day on which it was made."""

    def as_text(self) -> str:
        """The form for the environment variable DISTILL_API_KEYS."""
        return f"{self.tenant}:{self.id}:{self.sha256}"


class KeyFile(Section):
    """Everything in one file of keys."""

    keys: tuple[KeyEntry, ...] = ()
    """All keys that are valid."""
    tenants: dict[TenantName, TenantQuota] = Field(default={})
    """Quotas of tenants by name; what an entry leaves out is that of server.quota."""

    @model_validator(mode="after")
    def _ids_differ(self) -> Self:
        ids = [entry.id for entry in self.keys]
        twice = sorted({key_id for key_id in ids if ids.count(key_id) > 1})
        if twice:
            raise ValueError(f"the key id {twice[0]} is there twice")
        return self


def new_key(tenant: str) -> tuple[str, KeyEntry]:
    """(the key's text, to be shown once; its entry). Raises ConfigError for a name that no tenant can have."""
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    fields = {"id": key_id, "tenant": tenant, "sha256": hash_secret(secret), "created": datetime.datetime.now(datetime.UTC).date()}
    return f"dsk_{key_id}_{secret}", validate(KeyEntry, fields, origin=f"tenant {tenant[:100]!r}")


def split_key(text: str) -> tuple[str, str] | None:
    """(id, secret) of a key's text, None if it is no key of ours."""
    match = _KEY.fullmatch(text)
    return (match[1], match[2]) if match else None


def hash_secret(secret: str) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def parse_entries(text: str) -> tuple[KeyEntry, ...]:
    """The entries of DISTILL_API_KEYS: `TENANT:ID:SHA256`, separated by commas or white space. Raises ConfigError without showing any."""
    entries = []
    for number, word in enumerate(text.replace(",", " ").split(), start=1):
        parts = word.split(":")
        try:
            if len(parts) != 3:
                raise ConfigError("wrong number of parts")
            entries.append(validate(KeyEntry, dict(zip(("tenant", "id", "sha256"), parts, strict=True)), origin="DISTILL_API_KEYS"))
        except ConfigError:
            # Not shown: whoever got it wrong may have put the key itself there.
            raise ConfigError(
                f"DISTILL_API_KEYS: entry {number} is not TENANT:ID:SHA256 as `distill keys add TENANT --entry` prints"
            ) from None
    return tuple(entries)


def read_keys(path: Path) -> KeyFile:
    """The keys in a file.

    Raises:
        ConfigError: no such file, not readable as YAML, or not a file of keys.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"file of keys {path} is over {_LARGEST_FILE} bytes")
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file of keys {path}; `distill keys add TENANT --keys-file {path}` makes one") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"file of keys {path} is not YAML ({type(error).__name__})"
        ) from None  # its message would show a line of the file
    except OSError as error:
        raise ConfigError(f"file of keys {path} cannot be read: {error.strerror}") from error
    try:
        return KeyFile.model_validate({} if tree is None else tree)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]  # without the value: it may be a key that somebody put there
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"file of keys {path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


def write_keys(path: Path, keys: KeyFile) -> None:
    """Put a file there whole or not at all: readable by its owner only, or by whom the old one was. Raises ConfigError if that fails."""
    path = path.resolve()  # through a link to the file itself
    text = _HEAD + yaml.safe_dump(keys.model_dump(mode="json", exclude_unset=True), sort_keys=False, default_flow_style=None, width=200)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600 from its first moment
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                _as_before(path, number)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"file of keys {path} cannot be written: {error.strerror}") from error


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """The block reads and writes the file alone: two `distill keys` at once would lose a key. Raises ConfigError as `write_keys` does."""
    folder = path.resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder, os.O_RDONLY)  # the folder, because the file itself is replaced
    except OSError as error:
        raise ConfigError(f"file of keys {path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _as_before(path: Path, number: int) -> None:
    """Owner and mode of the old file for the new one: a gateway that runs as another user must be able to read it."""
    try:
        old = path.stat()
    except FileNotFoundError:
        return
    for owner, group in ((old.st_uid, -1), (-1, old.st_gid)):
        with suppress(PermissionError):  # not everybody may give files away; what can be kept is kept
            os.fchown(number, owner, group)
    os.fchmod(number, stat.S_IMODE(old.st_mode))
