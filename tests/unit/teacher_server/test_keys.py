"""API keys: made, kept as hashes, found, revoked; the command line and the running gateway's view of the file."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distill.cli.keys import keys
from distill.cli.main import run_command
from distill.cli.run_file import read_run_file
from distill.errors import ConfigError
from teacher_server.access import ANYBODY, Access, open_to_strangers
from teacher_server.key_file import KeyFile, new_key, parse_entries, read_keys, write_keys
from teacher_server.problems import Problem
from teacher_server.settings import ServerSettings, TenantQuota


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def tenant_of(access: Access, key: str) -> str | None:
    """The name, or None for a key that is not valid."""
    try:
        return access.tenant(bearer(key)).name
    except Problem as refused:
        problem = refused
    assert (problem.status, problem.code) == (401, "unauthorized")
    return None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "keys.yaml"


@pytest.fixture
def cli(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    monkeypatch.setenv("DISTILL_API_KEYS_FILE", str(path))

    def run(*words: str, code: int = 0) -> tuple[str, str]:
        assert run_command(["keys", *words]) == code, capsys.readouterr()
        return capsys.readouterr()

    return run


def test_a_key_is_shown_once_and_kept_as_a_hash_that_only_the_owner_reads(cli, path: Path) -> None:
    said, more = cli("add", "alice", "--images-per-s", "500", "--weight", "3")
    key = said.strip()
    assert re.fullmatch(r"dsk_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", key), "256 bits in base64url are 43 characters"
    assert key not in more
    secret = key.split("_", 2)[2]
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path], "nothing is left of the writing"
    access = Access(ServerSettings(keys_file=str(path)), {})
    usage = access.tenant(bearer(key))
    assert usage.name == "alice"
    assert usage.quota == TenantQuota(images_per_s=500, weight=3)


def test_list_and_revoke(cli, path: Path) -> None:
    first, second, other = (cli("add", tenant)[0].strip() for tenant in ("alice", "alice", "bob"))
    cli("add", "bob", "--max-concurrent", "4")
    listed = cli("list")[0]
    assert [line.split()[1] for line in listed.splitlines()] == ["alice", "alice", "bob", "bob"]
    assert "max_concurrent 4" in listed
    for key in (first, second, other):
        assert key.split("_")[1] in listed
        assert key.split("_", 2)[2] not in listed
    cli("revoke", first.split("_")[1])
    access = Access(ServerSettings(keys_file=str(path)), {})
    assert [tenant_of(access, key) for key in (first, second, other)] == [None, "alice", "bob"]
    cli("revoke", "alice")
    assert [entry.tenant for entry in read_keys(path).keys] == ["bob", "bob"]
    _, complaint = cli("revoke", other, code=2)
    assert "distill keys list" in complaint
    assert other not in complaint, "whoever pastes the key itself does not find it in a log"


def test_the_quota_goes_with_the_last_key_of_its_tenant(cli, path: Path) -> None:
    first, second = (cli("add", "alice", "--weight", "3")[0].split("_")[1] for _ in range(2))
    cli("add", "bob", "--weight", "2")
    cli("revoke", first)
    assert read_keys(path).tenants.keys() == {"alice", "bob"}
    cli("revoke", second)
    assert read_keys(path).tenants.keys() == {"bob"}
    cli("add", "alice")
    assert "server.quota" in cli("list")[0].splitlines()[-1]


def test_bad_words_are_one_line(cli, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tenant" in cli("add", "al ice", code=2)[1]
    assert "weight" in cli("add", "alice", "--weight", "0", code=2)[1]
    assert not path.exists()
    assert "distill keys add" in cli("list", code=2)[1]
    monkeypatch.delenv("DISTILL_API_KEYS_FILE")
    assert "--keys-file" in cli("add", "alice", code=2)[1]


def test_an_entry_for_the_environment(cli, path: Path) -> None:
    key, entry = cli("add", "alice", "--entry")[0].split()
    assert not path.exists()
    assert key.split("_", 2)[2] not in entry
    _, other = new_key("bob")
    access = Access(ServerSettings(), {"DISTILL_API_KEYS": f"{entry}, {other.as_text()}"})
    assert tenant_of(access, key) == "alice"
    assert tenant_of(access, key[:-1] + ("A" if key[-1] != "A" else "B")) is None
    with pytest.raises(ConfigError, match="entry 2 is not") as caught:
        parse_entries(f"{entry} {key}")
    assert key not in str(caught.value)


def test_only_whole_valid_keys_pass(path: Path) -> None:
    key, entry = new_key("alice")
    other, _ = new_key("alice")
    write_keys(path, KeyFile(keys=(entry,)))
    access = Access(ServerSettings(keys_file=str(path)), {})
    assert access.tenant({"x-api-key": key}).name == "alice"
    assert access.tenant({"authorization": f"bearer  {key} "}).name == "alice"
    secret = key.split("_", 2)[2]
    wrong = [other, f"dsk_{entry.id}_{other.split('_', 2)[2]}", f"dsk_{entry.id}_", secret, entry.sha256, f"dsk_{entry.id}_{entry.sha256}"]
    assert [tenant_of(access, text) for text in (*wrong, key[:-1], key + "A", "\u00e9" * 60)] == [None] * 9
    for headers in ({}, {"authorization": "Bearer"}, {"authorization": f"Basic {key}"}, {"x-api-key": ""}):
        with pytest.raises(Problem) as caught:
            access.tenant(headers)
        assert caught.value.status == 401
        assert caught.value.answer().headers["www-authenticate"].startswith("Bearer")


def test_a_running_gateway_notices_a_changed_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    (key, entry), (new, new_entry) = new_key("alice"), new_key("bob")
    write_keys(path, KeyFile(keys=(entry,)))
    access = Access(ServerSettings(keys_file=str(path)), {}, clock)
    usage = access.tenant(bearer(key))
    write_keys(path, KeyFile(keys=(new_entry,), tenants={"bob": TenantQuota(weight=2)}))
    clock.now = 0.9
    assert tenant_of(access, key) == "alice", "looked at once a second at most"
    clock.now = 1.0
    assert tenant_of(access, key) is None
    assert access.tenant(bearer(new)).quota.weight == 2
    write_keys(path, KeyFile(keys=(entry, new_entry), tenants={"bob": TenantQuota(weight=5)}))
    clock.now = 2.0
    assert access.tenant(bearer(key)) is usage, "what it has used is remembered"
    assert access.tenant(bearer(new)).quota.weight == 5
    path.write_text(f"keys: [{{id: {key}")  # a slip of the pen, with a key in it
    clock.now = 3.0
    with caplog.at_level(logging.INFO):
        assert tenant_of(access, key) == "alice"
    assert "stay valid" in caplog.text
    assert key not in caplog.text
    path.unlink()
    clock.now = 4.0
    assert tenant_of(access, key) is None, "a file that is taken away takes its keys with it"
    write_keys(path, KeyFile(keys=(entry,)))
    clock.now = 5.0
    assert tenant_of(access, key) == "alice"


def test_without_a_key_anywhere_nothing_starts_and_the_way_out_is_said(path: Path) -> None:
    for settings in (ServerSettings(), ServerSettings(keys_file=str(path))):
        with pytest.raises(ConfigError, match="distill keys add TENANT --keys-file"):
            Access(settings, {})
    write_keys(path, KeyFile())
    with pytest.raises(ConfigError, match=r"server\.auth=none"):
        Access(ServerSettings(), {"DISTILL_API_KEYS_FILE": str(path)})


@pytest.mark.parametrize(
    "text",
    ["keys: 3", "- a", "keys: [{id: 1}]", "\x00", "keys: [{id: abcdefabcdef, tenant: a, sha256: dsk_secret}]", "a: &a [*a]", "other: 1"],
)
def test_a_damaged_file_is_refused_in_one_line_without_its_values(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
        read_keys(path)
    assert "dsk_secret" not in str(caught.value)


def test_serve_refuses_at_once_and_says_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("DISTILL_API_KEYS", "DISTILL_API_KEYS_FILE"):
        monkeypatch.delenv(variable, raising=False)
    recipe = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
    monkeypatch.chdir(recipe.parents[1])  # the recipe's images are named from there
    assert run_command(["serve", "--config", str(recipe), f"run_dir={tmp_path}", "server.auth=keys"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "distill keys add TENANT --keys-file keys.yaml" in line
    assert "server.auth=none" in line
    assert read_run_file(recipe, []).server.auth == "none", "the quickstart is for this machine only"


def test_serve_shows_what_the_parity_gate_measured_but_no_names_of_images() -> None:
    from distill.cli.serving import _parity

    result = {"fingerprint": "ab", "parity": {"max_logit_error": 1e-5, "worst": [{"image_id": "private.jpg"}]}}
    assert _parity(SimpleNamespace(teacher=SimpleNamespace(result=lambda: result))) == {"ab": {"max_logit_error": 1e-5}}
    assert _parity(SimpleNamespace(teacher=SimpleNamespace(result=lambda: None))) == {}


def test_two_keys_of_one_id_are_refused() -> None:
    _, entry = new_key("alice")
    with pytest.raises(ValueError, match="twice"):
        KeyFile(keys=(entry, entry))


@pytest.mark.parametrize(("text", "auth"), [("off", "none"), ("'off'", "none"), ("no", "none"), ("none", "none"), ("keys", "keys")])
def test_every_spelling_of_off_in_yaml(text: str, auth: str) -> None:
    assert ServerSettings.model_validate(yaml.safe_load(f"auth: {text}")).auth == auth


@pytest.mark.parametrize("text", ["on", "~", "0", "''", "None"])
def test_nothing_else_opens_the_gateway(text: str) -> None:
    with pytest.raises(ValueError, match="auth"):
        ServerSettings.model_validate(yaml.safe_load(f"auth: {text}"))


def test_open_gateways_serve_one_tenant_and_are_warned_about_beyond_loopback() -> None:
    quota = TenantQuota(max_concurrent=3)
    usage = Access(ServerSettings(auth="none", quota=quota), {"DISTILL_API_KEYS": "nonsense"}).tenant({})
    assert (usage.name, usage.quota) == (ANYBODY, quota)
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert open_to_strangers(ServerSettings(auth="none", host=host)) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert host in (open_to_strangers(ServerSettings(auth="none", host=host)) or "")
        assert open_to_strangers(ServerSettings(host=host)) is None


def test_a_write_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, entry = new_key("alice")
    write_keys(path, KeyFile(keys=(entry,)))
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_keys(path, KeyFile())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_changed_file_keeps_its_owner_and_mode(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_keys(path, KeyFile())
    path.chmod(0o640)
    owners: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda number, owner, group: owners.append((owner, group)))
    write_keys(path, KeyFile(keys=(new_key("alice")[1],)))
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o640, "a gateway in the group can still read it"
    assert owners == [(found.st_uid, -1), (-1, found.st_gid)]

    def forbidden(number: int, owner: int, group: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", forbidden)
    write_keys(path, KeyFile())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_that_could_not_be_read_is_read_again(path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    (key, entry), (_, other) = new_key("alice"), new_key("bob")
    write_keys(path, KeyFile(keys=(entry, other)))
    access = Access(ServerSettings(keys_file=str(path)), {}, clock)
    write_keys(path, KeyFile(keys=(other,)))

    def unreadable(path: Path) -> KeyFile:
        raise ConfigError(f"file of keys {path} cannot be read: Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("teacher_server.access.read_keys", unreadable)
        for now in (1.0, 2.0, 3.0):
            clock.now = now
            assert tenant_of(access, key) == "alice"
    assert caplog.text.count("Permission denied") == 1, "said once, not every second"
    clock.now = 4.0
    assert tenant_of(access, key) is None, "revoked as soon as the file can be read, also if nobody touches it"


def test_a_quota_in_the_file_is_laid_over_that_of_the_server(cli, path: Path) -> None:
    key = cli("add", "alice", "--weight", "3")[0].strip()
    assert yaml.safe_load(path.read_text())["tenants"] == {"alice": {"weight": 3.0}}
    access = Access(ServerSettings(keys_file=str(path), quota=TenantQuota(images_per_s=7, max_concurrent=2)), {})
    assert access.tenant(bearer(key)).quota == TenantQuota(images_per_s=7, max_concurrent=2, weight=3)
    cli("add", "alice", "--max-concurrent", "128")  # the default, but said
    assert yaml.safe_load(path.read_text())["tenants"] == {"alice": {"weight": 3.0, "max_concurrent": 128}}
    assert "max_concurrent 128, weight 3" in cli("list")[0]


def test_two_keys_that_are_made_at_once_are_both_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_keys(path, KeyFile())
    both_have_read = threading.Barrier(2)

    def slow_read(path: Path) -> KeyFile:
        found = read_keys(path)
        with contextlib.suppress(threading.BrokenBarrierError):
            both_have_read.wait(0.5)
        return found

    monkeypatch.setattr("teacher_server.key_file.read_keys", slow_read)
    words = [["add", tenant, "--keys-file", str(path)] for tenant in ("alice", "bob")]
    threads = [threading.Thread(target=keys.main, args=(line,), kwargs={"standalone_mode": False}) for line in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(entry.tenant for entry in read_keys(path).keys) == ["alice", "bob"]


@pytest.mark.parametrize("name", ["quickstart", "cifar10", "fashion"])
def test_recipes_that_are_for_one_machine_need_no_keys(name: str) -> None:
    settings = read_run_file(Path(__file__).parents[3] / "recipes" / f"{name}.yaml", []).server
    assert settings.auth == "none"
    assert open_to_strangers(settings) is None
