"""What comes from strangers: files that may be endless or none, links that lead away, text that acts as a command."""

import functools
import os
import stat
from pathlib import Path

import polars as pl

from vit_nabirds.errors import TransientError, UserError, exit_code_of, reason_of

PARQUET_ERRORS = (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException)  # polars panics on damaged bytes
MOST_BYTES = 2**31  # of a file that lists photographs: those of iNaturalist's millions have half of them
MOST_ROWS = 50_000_000  # of a Parquet file, in which a row may take less than a bit
_FORMULA = r"^([=+\-@\t\r\n＝＋－＠])"


def read_bytes(file: Path, most: int = MOST_BYTES) -> bytes:
    """A whole file. UserError if it is a pipe or device, which may be endless, or has more than `most` bytes."""
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as opened:
        check_regular(file, os.fstat(opened.fileno()), most)
        return opened.readall()


def check_storage(file: Path, error: BaseException) -> None:
    """TransientError if a file was not read because of its storage, which says nothing about the file."""
    if exit_code_of(error) == TransientError.exit_code:
        raise TransientError(
            f"{file} cannot be read ({reason_of(error)}): run the same command again when the storage answers."
        ) from None


def read_text(file: Path, most: int = MOST_BYTES) -> str:
    """The same as text with line ends of one kind. UnicodeDecodeError unless it is UTF-8."""
    text = read_bytes(file, most).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def check_regular(file: Path, status: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{file}: not a regular file, but a folder, pipe or device. Replace it by the file it stands for."
        )
    if status.st_size > most:
        raise UserError(
            f"{file}: {status.st_size:,} bytes, more than the {most:,} that are read. Split it or make it smaller."
        )


def read_parquet(file: Path, **options) -> pl.DataFrame:
    """As `polars.read_parquet`. UserError for a file that is not regular, or says that it has too many rows."""
    check_regular(file, os.stat(file), MOST_BYTES)
    rows = pl.scan_parquet(file).select(pl.len()).collect().item()  # from its footer alone
    if rows > MOST_ROWS:
        raise UserError(f"{file}: {rows:,} rows, more than the {MOST_ROWS:,} that are read. Split it.")
    return pl.read_parquet(file, **options)


def leads_out(root: Path, path: str) -> bool:
    """Whether a path below `root` leads out of it through links. `root` may be a link itself."""
    top, (folder, name) = _real(str(root)), os.path.split(os.path.join(root, path))
    real = os.path.join(_real(folder), name)
    if os.path.islink(real):
        real = os.path.realpath(real)
    return os.path.commonpath([top, real]) != top


@functools.lru_cache(2**16)  # a folder holds many photographs, and a cluster's disk is slow
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def without_formulas(text: pl.Expr) -> pl.Expr:
    """Cells of a CSV file: a spreadsheet runs those that start like a formula, unless a single quote comes first."""
    return text.str.replace(_FORMULA, "'$1")
