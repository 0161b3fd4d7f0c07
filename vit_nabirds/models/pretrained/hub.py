"""The Hugging Face Hub: whether an upload could succeed, and the upload of a folder."""

import re
from pathlib import Path

import huggingface_hub

from vit_nabirds.errors import ConfigError, UserError, quoted, shown


def check_upload(name: str) -> None:
    """Before long work: ConfigError for what is no Hub id, UserError without a token."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ConfigError(f"--push is {shown(name)}: give the id of a model on the Hub, ORG/NAME.")
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"--push={name} needs a token of the Hugging Face Hub that may write: log in with `hf auth login`, or set "
            "HF_TOKEN. Nothing was written."
        )


def upload(folder: Path, name: str) -> str:
    """Upload a folder as the model `name`, which is private if it is new, and say where it is.

    UserError for whatever goes wrong; the folder stays.
    """
    try:
        huggingface_hub.create_repo(name, private=True, exist_ok=True)
        info = huggingface_hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of vit-nabirds")
    except Exception as error:  # each version of the Hub's client raises other types
        reason = next((line for line in str(error).splitlines() if line.strip()), "?")
        raise UserError(
            f"{folder} is written, but could not be uploaded as {name} ({type(error).__name__}: {quoted(reason)}). See "
            f"whether the network is there and your token may write to {name.partition('/')[0]}, then run "
            f"`hf upload --private {name} {folder}`."
        ) from None
    return f"uploaded: {info.repo_url}"
