"""`vopd-server keys`: gives tenants their API keys, lists them, and takes them back. Running servers notice."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from vopd_server.key_file import KeyFile, StoredKey, new_key, utc_now, with_key, with_revoked
from vopd_server.key_storage import change_key_file, read_key_file, write_key
from vopd_server.tenancy import TenantLimits
from vopd_settings import SettingsError

KEYS_FILE_VARIABLE = "VOPD_SERVER_KEYS_FILE"
ABOUT = "Makes, lists and revokes API keys. A server that was started with the same keys file notices within seconds."
COLUMN_GAP = "  "
NOT_SET = "-"


def run_keys(argv: Sequence[str]) -> int:
    """One of `keys create|list|revoke`; help without any. Raises: SettingsError for the flags, ConfigError."""
    parser = _parser()
    arguments = parser.parse_args(list(argv))
    if arguments.run is None:
        parser.print_help()
        return 0
    if arguments.keys_file is None:
        raise SettingsError(f"which keys file? name it with --keys-file FILE, or in {KEYS_FILE_VARIABLE}")
    run: Callable[[argparse.Namespace], None] = arguments.run
    run(arguments)
    return 0


def create(arguments: argparse.Namespace) -> None:
    """Prints the new key, or writes it to --key-out: the keys file holds its hash alone."""
    keys_file: Path = arguments.keys_file
    key_out: Path | None = arguments.key_out
    limits = TenantLimits(
        weight=arguments.weight,
        tokens_in_flight=arguments.tokens_in_flight,
        tokens_per_minute=arguments.tokens_per_minute,
        queue_tokens=arguments.queue_tokens,
        max_top_k=arguments.max_top_k,
    )
    key, stored = new_key(arguments.id, limits, created_at=utc_now())
    if key_out is not None:
        write_key(key_out, key)
    try:
        change_key_file(keys_file, lambda file: with_key(file, stored), create=True)
    except BaseException:
        if key_out is not None:
            key_out.unlink()  # it would open nothing
        raise
    if key_out is not None:
        _tell(
            f"Tenant {stored.id} was added to {keys_file}; its key is in {key_out}, for vopd-client's --api-key-file."
        )
        return
    _tell(f"Tenant {stored.id} was added to {keys_file}. Its key, shown this once (the file holds its hash):")
    _print(key)


def list_keys(arguments: argparse.Namespace) -> None:
    """A table for people, or JSON; neither holds a secret or the hash of one."""
    file = read_key_file(arguments.keys_file)
    if arguments.json:
        rows = [key.model_dump(mode="json", exclude={"secret_sha256"}) for key in file.keys]
        _print(json.dumps(rows, indent=2))
        return
    _print(table(file))
    _tell(f"\n{file.summary} in {arguments.keys_file}")
    if file.keys:
        _tell("IN FLIGHT, A MINUTE and QUEUE count tokens, SUPPORT ids a position; -: no limit but the server's")


def revoke(arguments: argparse.Namespace) -> None:
    """The tenant stays in the file, as revoked, until its id is given to a new key."""
    change_key_file(arguments.keys_file, lambda file: with_revoked(file, arguments.id, revoked_at=utc_now()))
    _tell(f"The key of tenant {arguments.id} was revoked in {arguments.keys_file}.")


def table(file: KeyFile) -> str:
    """One line a key, aligned."""
    header = ("TENANT", "STATE", "WEIGHT", "IN FLIGHT", "A MINUTE", "QUEUE", "SUPPORT", "CREATED")
    sides = "<<>>>>><"
    rows = [header, *(_row(key) for key in file.keys)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        COLUMN_GAP.join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _row(key: StoredKey) -> tuple[str, ...]:
    limits = (key.tokens_in_flight, key.tokens_per_minute, key.queue_tokens, key.max_top_k)
    return (
        key.id,
        "active" if key.revoked_at is None else f"revoked {key.revoked_at:%Y-%m-%d}",
        f"{key.weight:g}",
        *(NOT_SET if limit is None else str(limit) for limit in limits),
        f"{key.created_at:%Y-%m-%d %H:%M} UTC",
    )


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print the whole usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    variable = os.environ.get(KEYS_FILE_VARIABLE)
    shared = _Parser(add_help=False)
    shared.add_argument(
        "--keys-file",
        type=Path,
        metavar="FILE",
        default=Path(variable) if variable else None,
        help=f"JSON file with the tenants and the hashes of their keys (default: {KEYS_FILE_VARIABLE})",
    )
    parser = _Parser(prog="vopd-server keys", description=ABOUT, allow_abbrev=False)
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    about = "give a tenant a key, and print it"
    making = commands.add_parser(
        "create",
        parents=[shared],
        help=about,
        description=f"{about.capitalize()}. What is not limited here is limited by the server's own settings alone.",
        allow_abbrev=False,
    )
    making.add_argument("id", metavar="ID", help="who it is for: letters, digits, - and _")
    making.add_argument(
        "--weight", type=_weight, default=1.0, help="share of a busy engine, against the others' (default: 1)"
    )
    for flag, about_limit in LIMITS.items():
        making.add_argument(flag, type=_limit, metavar="N", help=about_limit)
    making.add_argument("--key-out", type=Path, metavar="FILE", help="write the key to this new file instead")
    making.set_defaults(run=create)

    about = "list tenants and their limits, never their keys"
    listing = commands.add_parser(
        "list", parents=[shared], help=about, description=f"{about.capitalize()}.", allow_abbrev=False
    )
    listing.add_argument("--json", action="store_true", help="as JSON, for scripts")
    listing.set_defaults(run=list_keys)

    about = "refuse a tenant's key from now on"
    revoking = commands.add_parser(
        "revoke", parents=[shared], help=about, description=f"{about.capitalize()}.", allow_abbrev=False
    )
    revoking.add_argument("id", metavar="ID", help="whose key it is")
    revoking.set_defaults(run=revoke)
    return parser


LIMITS = {
    "--tokens-in-flight": "tokens in the engine at a time, at most",
    "--tokens-per-minute": "tokens let into the engine a minute, on average; what comes faster waits",
    "--queue-tokens": "tokens admitted and not yet answered, at most; over it requests are refused and streams held",
    "--max-top-k": "ids in the support of one position, at most",
}


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (0 < weight < math.inf):
        raise argparse.ArgumentTypeError(f"must be a number above 0 (got {text!r})")
    return weight


def _limit(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1 (got {text!r})")
    return int(text)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _tell(line: str) -> None:
    """To whoever reads along; standard output holds what a script would take."""
    sys.stderr.write(f"{line}\n")
