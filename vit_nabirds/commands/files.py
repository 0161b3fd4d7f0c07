"""The files that commands write."""

from pathlib import Path

from vit_nabirds.errors import ConfigError


def check_file(flag: str, file: Path, suffixes: tuple[str, ...]) -> None:
    """ConfigError if what a flag names cannot be written, or ends in none of the suffixes."""
    if file.suffix not in suffixes:
        *others, last = suffixes
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise ConfigError(f"--{flag}={file}: its name must end in {allowed}.")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--{flag}={file}: there is no folder {file.absolute().parent}.")
    if file.is_dir():
        raise ConfigError(f"--{flag}={file} is a folder: give the name of a file.")
