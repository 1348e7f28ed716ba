"""`hybridsd-cloud tokens`: who may call, without a server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hybridsd.tokens import MAX_LIMIT, SCOPES, Quota, add_token, list_tokens, parse_expiry, remove_token

F = TypeVar("F", bound=Callable[..., Any])
_TOKEN_FILE = click.option(
    "--file", "path", required=True, type=click.Path(dir_okay=False, path_type=Path),
    envvar="HYBRIDSD_CLOUD_TOKEN_FILE", show_envvar=True, help="The token file of the server, which sees its changes.",
)  # fmt: skip


def _limit(flag: str, least: int, text: str) -> Callable[[F], F]:
    return click.option(flag, type=click.IntRange(least, MAX_LIMIT), help=f"{text}; no limit if not set.")


@click.group()
def tokens() -> None:
    """Adds, lists and removes the tokens of callers."""


@tokens.command()
@click.argument("name")
@_TOKEN_FILE
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    default=("generate",),
    show_default=True,
    help="What it may: ask for images, before those without priority, read metrics, see and stop all jobs. Repeatable.",
)
@click.option(
    "--expires",
    default="never",
    show_default=True,
    help="When it ends: a span such as 90d or 12h, a date such as 2027-01-31, or never.",
)
@click.option(
    "--weight",
    type=click.FloatRange(0, 1000, min_open=True),
    default=1.0,
    show_default=True,
    help="Its share of the machine, beside those of the others.",
)
@_limit("--jobs", 1, "Jobs at once; more wait")
@_limit("--queued", 0, "Jobs that wait; more are refused")
@_limit("--steps-per-minute", 1, "Calls of the U-Net; more are refused")
@_limit("--pixels", 1, "Width times height of an image")
@_limit("--bytes", 0, "Images that a gateway keeps")
def add(path: Path, name: str, scopes: tuple[str, ...], expires: str, weight: float, **limits: int | None) -> None:
    """Makes a token and prints it, once: the file has only its hash. A running server takes it without a restart."""
    try:
        secret = add_token(
            path, name, scopes=frozenset(scopes), expires=parse_expiry(expires), weight=weight, quota=Quota(**limits)
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(secret)
    click.echo(f"{name} is in {path}; keep the token, which is shown only now", err=True)


@tokens.command("list")
@_TOKEN_FILE
def list_(path: Path) -> None:
    """Prints names, scopes, expiry, weight and quotas; never tokens or hashes."""
    try:
        click.echo("\n".join(list_tokens(path)))
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@tokens.command()
@click.argument("name")
@_TOKEN_FILE
def remove(path: Path, name: str) -> None:
    """Removes a token: its next call is refused, without a restart; its running jobs go on to their end."""
    try:
        remove_token(path, name)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{name} is removed from {path}", err=True)
