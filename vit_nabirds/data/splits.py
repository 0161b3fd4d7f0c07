"""Which photographs are held out of the training: the same on every machine, and fair to each species."""

import hashlib

import polars as pl


def held_out(table: pl.DataFrame, share: float) -> pl.Series:
    """Boolean (rows): about `share` of each species' photographs, from path, species_name, subcategory, photographer.

    Photographs of one species by one photographer stay on one side; where the photographer is unknown (null, or the
    same name in all rows), each is alone. Each subcategory keeps at least one photograph that is not held out. Whether
    one is held out does not depend on the order of the rows.
    """
    if table["photographer"].n_unique() == 1:
        table = table.with_columns(photographer=pl.lit(None, pl.String))
    taker = pl.col("photographer").fill_null(pl.col("path"))
    keys = table.select(pl.concat_str("species_name", taker, separator="\n")).to_series()
    # A hash names and orders the groups: photographs that come or go leave the others where they are.
    rows = table.select("species_name", "subcategory", group=pl.Series([_hash(key) for key in keys], dtype=pl.UInt64))
    last = pl.col("group") == pl.col("group").max().over("species_name", "subcategory")
    groups = rows.with_columns(stays=last).group_by("group").agg(pl.first("species_name"), pl.len(), pl.any("stays"))
    wanted = dict(rows.group_by("species_name").agg((share * pl.len() + 0.5).floor()).rows())
    chosen = []
    for group, species, size in groups.filter(~pl.col("stays")).drop("stays").sort("group").iter_rows():
        if size <= wanted[species]:
            wanted[species] -= size
            chosen.append(group)
    return rows["group"].is_in(pl.Series(chosen, dtype=pl.UInt64).implode()).rename("held_out")


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
