"""Who asks: the API key of a request -> its tenant. Without keys everybody is one tenant.

Flow: HTTP headers -> key -> entry by its id -> hash compared in constant time -> the tenant and what it has used. The file of keys is
looked at once a second at most, so a key that is revoked stops working without a restart.
Unit of data: one request.
"""

from __future__ import annotations

import hmac
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from distill.errors import ConfigError
from teacher_server.key_file import KeyEntry, KeyFile, hash_secret, parse_entries, read_keys, split_key
from teacher_server.problems import Problem
from teacher_server.quotas import TenantUsage
from teacher_server.settings import ServerSettings, TenantQuota

KEYS_FILE_VARIABLE = "DISTILL_API_KEYS_FILE"
KEYS_VARIABLE = "DISTILL_API_KEYS"
ANYBODY = "anybody"
"""The one tenant without keys."""

_LOOK_EVERY_S = 1.0
_NO_HASH = "0" * 64  # compared with where there is no such id, so that both answers take as long

logger = logging.getLogger(__name__)


class Access:
    """The keys that are valid now, and the usage of their tenants. Belongs to one event loop."""

    def __init__(
        self, settings: ServerSettings, environment: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises ConfigError if keys are wanted and there are none, or the file of keys cannot be used."""
        self._settings = settings
        self._clock = clock
        self._usage: dict[str, TenantUsage] = {}
        self._path = keys_path(settings, environment)
        self._fixed = parse_entries(environment.get(KEYS_VARIABLE, "")) if settings.auth == "keys" else ()
        self._from_file = KeyFile()
        self._entries: dict[str, KeyEntry] = {}
        self._seen: tuple[int, ...] | None = None
        self._looked = clock()
        self._complaint = ""
        if settings.auth == "keys":
            self._load()
            if not self._entries:
                raise ConfigError(_no_keys(self._path))

    def tenant(self, headers: Mapping[str, str]) -> TenantUsage:
        """Whose request this is. Raises Problem 401."""
        if self._settings.auth == "none":
            return self._usage_of(ANYBODY)
        self._look()
        text = _presented(headers)
        if text is None:
            raise Problem(401, "unauthorized", "an API key is needed, as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        parts = split_key(text)
        entry = self._entries.get(parts[0]) if parts else None
        given = hash_secret(parts[1]) if parts else _NO_HASH
        # One answer for all three: which ids exist is nobody's business.
        if not hmac.compare_digest(given, entry.sha256 if entry else _NO_HASH) or entry is None:
            raise Problem(401, "unauthorized", "this API key is not valid")
        return self._usage_of(entry.tenant)

    def _usage_of(self, tenant: str) -> TenantUsage:
        usage = self._usage.get(tenant)
        if usage is None:
            usage = self._usage[tenant] = TenantUsage(tenant, self._quota(tenant), self._clock)
        return usage

    def _quota(self, tenant: str) -> TenantQuota:
        """What the file says of this tenant, laid over server.quota."""
        own = self._from_file.tenants.get(tenant)
        return self._settings.quota if own is None else self._settings.quota.replace(**own.model_dump(exclude_unset=True))

    def _look(self) -> None:
        """Read the file again if it changed."""
        now = self._clock()
        if self._path is None or now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        if _signature(self._path) == self._seen:
            return
        try:
            self._load()
            logger.info("file of keys %s was read again: %d keys", self._path, len(self._entries))
        except ConfigError as error:
            # A slip of the pen must not lock everybody out; a file that was taken away locks out everybody in it (see _load).
            # It is read again every second, so that a revoked key is out as soon as the file can be read; said once.
            if str(error) != self._complaint:
                logger.error("%s; the keys read before stay valid", error)
            self._complaint = str(error)

    def _load(self) -> None:
        if self._path is not None:
            found = _signature(self._path)  # before reading: what is changed meanwhile differs from it
            first = not self._entries
            if found is None and not first:
                logger.error("file of keys %s is gone: none of its keys is valid any more", self._path)
                self._from_file = KeyFile()
            else:
                self._from_file = read_keys(self._path)
            self._seen, self._complaint = found, ""
        self._entries = {entry.id: entry for entry in (*self._fixed, *self._from_file.keys)}
        for name, usage in list(self._usage.items()):
            if usage.quota != self._quota(name):
                del self._usage[name]  # a new quota begins with a full bucket


def keys_path(settings: ServerSettings, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file of keys that these settings mean, if any."""
    text = settings.keys_file or environment.get(KEYS_FILE_VARIABLE)
    return Path(text).expanduser() if text else None


def open_to_strangers(settings: ServerSettings) -> str | None:
    """A warning if anybody on the network may ask without a key."""
    if settings.auth == "keys" or settings.host in ("localhost", "::1") or settings.host.startswith("127."):
        return None
    return f"server.auth is `none` and server.host is {settings.host}: anybody who reaches port {settings.port} can use the teacher"


def _presented(headers: Mapping[str, str]) -> str | None:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None


def _signature(path: Path) -> tuple[int, ...] | None:
    """What differs when a file has been changed or replaced; None if it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


def _no_keys(path: Path | None) -> str:
    where = f"file of keys {path} holds none" if path else f"neither server.keys_file nor ${KEYS_VARIABLE} names any"
    make = f"`distill keys add TENANT --keys-file {path or 'keys.yaml'}`" + ("" if path else " and server.keys_file=keys.yaml")
    return f"server.auth is `keys`, but {where}; make one with {make}, or let everybody in with server.auth=none"
