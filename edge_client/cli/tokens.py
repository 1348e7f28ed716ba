"""`hybridsd tokens`: who may use a gateway. It need not run meanwhile, and sees changes if it does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from edge_client.cli.shared_options import CONTEXT, NumberRange
from hybridsd.errors import Reason
from hybridsd.tokens import MAX_LIMIT, SCOPES, Quota, add_token, list_tokens, parse_expiry, remove_token

F = TypeVar("F", bound=Callable[..., Any])
_TOKEN_FILE = click.option(
    "--client-tokens", "path", required=True, type=click.Path(dir_okay=False, path_type=Path),
    envvar="HYBRIDSD_EDGE_CLIENT_TOKENS", help="As of the gateway.",
)  # fmt: skip


def _limit(flag: str, least: int, text: str) -> Callable[[F], F]:
    return click.option(flag, type=click.IntRange(least, MAX_LIMIT), help=f"{text}. Default: no limit.")


@click.group(context_settings=CONTEXT)
def tokens() -> None:
    """Adds, lists and removes the tokens of a gateway's clients."""


@tokens.command(context_settings=CONTEXT)
@click.argument("name")
@_TOKEN_FILE
@click.option(
    "--scope", "scopes", envvar="HYBRIDSD_EDGE_SCOPE", type=click.Choice(SCOPES), multiple=True, default=("generate",),
    show_default=True,
    help="What it may: ask for images, before those without priority, read metrics, see and stop all jobs. Repeatable.",
)  # fmt: skip
@click.option(
    "--expires", default="never", show_default=True,
    help="When it ends: a span such as 90d or 12h, a date such as 2027-01-31, or never.",
)  # fmt: skip
@click.option(
    "--weight", type=NumberRange(0, 1000, min_open=True), default=1.0, show_default=True,
    help="Its share of the workers, beside those of the others.",
)  # fmt: skip
@_limit("--jobs", 1, "Jobs that run at once; more wait")
@_limit("--queued", 0, "Jobs that wait; more are refused")
@_limit("--steps-per-minute", 1, "Steps of all its images; more are refused")
@_limit("--pixels", 1, "Width times height of an image; larger ones are refused")
@_limit("--bytes", 0, "Of its images that are kept; its oldest jobs are deleted")
def add(path: Path, name: str, scopes: tuple[str, ...], expires: str, weight: float, **limits: int | None) -> None:
    """Makes a token and prints it, once: the file has only its hash."""
    try:
        secret = add_token(
            path, name, scopes=frozenset(scopes), expires=parse_expiry(expires), weight=weight, quota=Quota(**limits)
        )
    except ValueError as error:
        raise Reason.FIELD_INVALID.error(str(error)) from error
    click.echo(secret)
    click.echo(f"{name} is in {path}; keep the token, which is shown only now", err=True)


@tokens.command("list", context_settings=CONTEXT)
@_TOKEN_FILE
def list_(path: Path) -> None:
    """Prints names, scopes, expiry, weight and quotas; never tokens or hashes."""
    try:
        click.echo("\n".join(list_tokens(path)))
    except ValueError as error:
        raise Reason.FIELD_INVALID.error(str(error)) from error


@tokens.command(context_settings=CONTEXT)
@click.argument("name")
@_TOKEN_FILE
def remove(path: Path, name: str) -> None:
    """Removes a token: its next request is refused. Its jobs go on, and are kept for the next token of that name."""
    try:
        remove_token(path, name)
    except ValueError as error:
        raise Reason.FIELD_INVALID.error(str(error)) from error
    click.echo(f"{name} is removed from {path}", err=True)
