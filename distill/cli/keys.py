"""`distill keys`: the API keys of the gateway, and how much each tenant may ask for, in a file that holds hashes only.

A gateway that runs notices the changed file within a second. Nothing heavy is imported here before a command runs: `distill --help` must
answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_KEYS_FILE = click.option(
    "--keys-file",
    type=click.Path(path_type=Path),
    envvar="DISTILL_API_KEYS_FILE",
    show_envvar=True,
    help="The file, which server.keys_file of the run file names.",
)


@click.group("keys", short_help="API keys of the gateway: add, list, revoke.")
def keys() -> None:
    """API keys of the gateway. A key is shown once, when it is made; the file holds its hash, its tenant and the tenant's quota."""


@keys.command()
@click.argument("tenant")
@_KEYS_FILE
@click.option("--entry", is_flag=True, help="No file: print the hashed entry for the variable DISTILL_API_KEYS as a second line.")
@click.option("--images-per-s", type=float, help="Quota of the tenant: images a second in the long run.")
@click.option("--requests-per-s", type=float, help="Requests a second in the long run.")
@click.option("--burst-s", type=float, help="Seconds' worth of both that may come at once.")
@click.option("--max-concurrent", type=int, help="Requests under way at once.")
@click.option("--weight", type=float, help="Share of the teacher while several tenants wait for it.")
def add(tenant: str, keys_file: Path | None, entry: bool, **quota: float | None) -> None:
    """Make a key for TENANT and print it: the only time that it can be seen. A tenant may have several."""
    from distill.errors import ConfigError
    from teacher_server.key_file import KeyFile, changing, new_key, read_keys, write_keys

    given = {name: value for name, value in quota.items() if value is not None}
    text, made = new_key(tenant)
    if entry:
        if given:
            raise ConfigError("quotas stand in a file of keys; with --entry the tenant has the quota of server.quota")
        click.echo(text)
        click.echo(made.as_text())
        return
    path = _wanted(keys_file)
    with changing(path):
        kept = read_keys(path) if path.exists() else KeyFile()
        tenants = kept.tenants if not given else {**kept.tenants, tenant: _quota(kept.tenants.get(tenant), given)}
        write_keys(path, kept.replace(keys=(*kept.keys, made), tenants=tenants))
    click.echo(text)
    click.echo(f"key {made.id} of tenant {tenant} is in {path}; keep the line above, it is not shown again", err=True)


@keys.command("list")
@_KEYS_FILE
def list_keys(keys_file: Path | None) -> None:
    """Id, tenant, day and quota of every key in the file."""
    from teacher_server.key_file import read_keys

    kept = read_keys(_wanted(keys_file))
    for entry in kept.keys:
        quota = kept.tenants.get(entry.tenant)
        own = quota.model_dump(exclude_unset=True) if quota else {}
        limits = (
            ", ".join(f"{name} {'unlimited' if value is None else format(value, 'g')}" for name, value in own.items()) or "server.quota"
        )
        click.echo(f"{entry.id}  {entry.tenant}  {entry.created or 'no date'}  {limits}")


@keys.command()
@click.argument("which", metavar="KEY_ID|TENANT")
@_KEYS_FILE
def revoke(which: str, keys_file: Path | None) -> None:
    """Take away one key by its id, or all keys of a tenant. With the last key of a tenant its quota goes, too."""
    from distill.errors import ConfigError
    from teacher_server.key_file import changing, read_keys, write_keys

    path = _wanted(keys_file)
    with changing(path):
        kept = read_keys(path)
        gone = [entry for entry in kept.keys if entry.id == which] or [entry for entry in kept.keys if entry.tenant == which]
        if not gone:
            # An id is no secret, but whoever pastes the whole key here should not find it in a log.
            shown = "that" if which.startswith("dsk_") else repr(which[:64])
            raise ConfigError(f"no key in {path} has the id or the tenant {shown}; `distill keys list` shows them")
        left = tuple(entry for entry in kept.keys if entry not in gone)
        without_key = {entry.tenant for entry in gone} - {entry.tenant for entry in left}
        write_keys(path, kept.replace(keys=left, tenants={name: q for name, q in kept.tenants.items() if name not in without_key}))
    for entry in gone:
        click.echo(f"key {entry.id} of tenant {entry.tenant} is revoked")


def _wanted(keys_file: Path | None) -> Path:
    from distill.errors import ConfigError

    if keys_file is None:
        raise ConfigError("say which file of keys is meant: --keys-file FILE, or the variable DISTILL_API_KEYS_FILE")
    return keys_file.expanduser()


def _quota(before: Any, given: dict[str, float]) -> Any:
    from distill.config import validate
    from teacher_server.settings import TenantQuota

    return validate(TenantQuota, {**(before.model_dump(exclude_unset=True) if before else {}), **given}, origin="quota")
