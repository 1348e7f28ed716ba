"""The tables of the gateway, alike in SQLite and Postgres, and how older ones are brought up to date."""

import sqlalchemy as sa

SCHEMA_VERSION = 3
"""Of the tables. Version 0 had no sizes, version 1 no users and work, version 2 no replicas."""

meta = sa.MetaData()
_number = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # which counts up only what it calls INTEGER

jobs = sa.Table(
    "jobs", meta,
    sa.Column("number", _number, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("api", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("error", sa.JSON),
    sa.Column("webhook_due", sa.Boolean, nullable=False, default=False),
    sa.Column("upload_bytes", _number, nullable=False, server_default="0"),
    sa.Column("image_bytes", _number, nullable=False, server_default="0"),
    sa.Column("user", sa.Text, nullable=False, server_default=""),
    sa.Column("steps", sa.Integer, nullable=False, server_default="0"),
    sa.Column("width", sa.Integer, nullable=False, server_default="0"),
    sa.Column("height", sa.Integer, nullable=False, server_default="0"),
    sa.Column("upload_key", sa.Text, nullable=False, server_default=""),
    sa.Column("is_cancelled", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("lease_until", sa.Float),
    sa.Column("webhook_until", sa.Float),
    sa.Column("num_left", sa.Integer, nullable=False, server_default="0"),
)  # fmt: skip
"""`upload_key`: the folder of its uploads; empty: its number. `is_cancelled`: somebody has asked for that while it ran.
`lease_until`: until then, by the clock of the database, it is the replica's that runs it; `webhook_until`: its webhook
is that of the one that calls it. None with SQLite. `num_left`: attempts that a replica gave up because it was told to
stop."""

images = sa.Table(
    "images", meta,
    sa.Column("job", sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("index", sa.Integer, primary_key=True),
    sa.Column("record", sa.JSON, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="1"),
)  # fmt: skip
"""`attempt`: by which it was made, and which is in the name of its file from the second on."""

events = sa.Table(
    "events", meta,
    sa.Column("job", _number, primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("slot", sa.Text, nullable=False, server_default=""),
    sa.Column("data", sa.JSON, nullable=False),
)  # fmt: skip
"""What replicas tell each other of running jobs. Of those with the same `slot` the last one is kept."""

replicas = sa.Table(
    "replicas", meta,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("workers", sa.Integer, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
)  # fmt: skip

buckets = sa.Table(
    "buckets", meta,
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("per_minute", sa.Float, nullable=False),
    sa.Column("level", sa.Float, nullable=False),
    sa.Column("at_s", sa.Float, nullable=False),
)  # fmt: skip
"""What tokens have left of their steps a minute."""

facts = sa.Table(
    "facts", meta, sa.Column("name", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False)
)
"""`version` of the tables in Postgres, `secret`, and `images`: what is written beside the images of this database."""

_ADDED = (
    *(("jobs", name, "INTEGER NOT NULL DEFAULT 0") for name in ("upload_bytes", "image_bytes")),  # in version 1
    ("jobs", "user", "TEXT NOT NULL DEFAULT ''"),  # in version 2
    *(("jobs", name, "INTEGER NOT NULL DEFAULT 0") for name in ("steps", "width", "height")),
    ("jobs", "upload_key", "TEXT NOT NULL DEFAULT ''"),
    ("jobs", "is_cancelled", "BOOLEAN NOT NULL DEFAULT false"),  # in version 3
    ("jobs", "lease_until", "FLOAT"),
    ("jobs", "webhook_until", "FLOAT"),
    ("jobs", "num_left", "INTEGER NOT NULL DEFAULT 0"),
    ("images", "attempt", "INTEGER NOT NULL DEFAULT 1"),
)
"""Columns that older tables lack: of which table, name and type."""


def update(connection: sa.Connection) -> None:
    """Creates the tables that are missing, and adds the columns that older ones lack."""
    inspector = sa.inspect(connection)
    there = {
        name: {column["name"] for column in inspector.get_columns(name)}
        for name in ("jobs", "images")
        if inspector.has_table(name)
    }
    for table, name, kind in _ADDED:
        if table in there and name not in there[table]:
            connection.exec_driver_sql(f'ALTER TABLE {table} ADD COLUMN "{name}" {kind}')
    meta.create_all(connection)
