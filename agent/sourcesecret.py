"""Addresses, users and passwords of network sources, read from files of their own when a source is opened.

Read by the daemon, whose user alone can; the source process gets what stood in them, and nothing else ever holds it.
Invariant: a message names the file, or its line's shape, never what stands in it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.errors import ConfigError, Reason, SourceError
from agent.sourceconfig import SourceConfig

MAX_BYTES = 4096
CREDENTIAL = "credential:"


def with_secrets(source: SourceConfig, base: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The options of `source` with what its `url_file` and `credentials_file` hold in their place.

    Args:
        base: folder from which relative names are taken.
        environment: names the folder of the service's credentials, for `credential:NAME`.

    Raises:
        SourceError: `source_missing`, `source_unreadable`.
        ConfigError: `bad_config`: others may read the file, or it is not one line of text.
    """
    options = dict(source.options)
    if options.get("url_file"):
        options["url"] = _line(str(options["url_file"]), base, environment)
        options["url_file"] = ""
    if options.get("credentials_file"):
        options["credentials_file"] = _line(str(options["credentials_file"]), base, environment)
    return options


def _line(name: str, base: Path, environment: Mapping[str, str]) -> str:
    path = _path(name, base, environment)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        reason = Reason.SOURCE_MISSING if isinstance(e, FileNotFoundError) else Reason.SOURCE_UNREADABLE
        raise SourceError(
            reason, f"{path}: {e.strerror}", hint="let the edge-agent user read it, and nobody else"
        ) from e
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError(Reason.BAD_CONFIG, f"{path} is not a file", hint="give the path of a file with one line")
        # root may hand it to the daemon's group, as it does agent.toml
        others = 0o037 if facts.st_uid == 0 else 0o077
        if facts.st_mode & others and not name.startswith(CREDENTIAL):
            raise ConfigError(
                Reason.BAD_CONFIG, f"{path} can be read by others", hint=f"chown edge-agent {path}; chmod 0600 {path}"
            )
        data = os.read(fd, MAX_BYTES + 1)
    except OSError as e:
        raise SourceError(Reason.SOURCE_UNREADABLE, f"{path}: {e.strerror}", hint="check the disk it is on") from e
    finally:
        os.close(fd)
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        lines = []
    if len(data) > MAX_BYTES or len(lines) != 1 or not lines[0].isprintable():
        raise ConfigError(Reason.BAD_CONFIG, f"{path} is not one line of text", hint="write one line into it")
    return lines[0].strip()


def _path(name: str, base: Path, environment: Mapping[str, str]) -> Path:
    if not name.startswith(CREDENTIAL):
        return base / name
    folder, file = environment.get("CREDENTIALS_DIRECTORY", ""), name.removeprefix(CREDENTIAL)
    if not folder or "/" in file or file in ("", ".", ".."):
        raise SourceError(
            Reason.SOURCE_MISSING,
            f"the service has no credential {file!r}",
            hint=f"LoadCredentialEncrypted={file}:/etc/edge-agent/{file}.cred in a drop-in of edge-agent.service",
        )
    return Path(folder) / file
