"""Fine-tune Vision Transformers on photographs of birds: `python main.py help` lists the commands."""

import sys

if __name__ == "__main__":
    try:
        from vit_nabirds.cli import console
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the package {error.name!r} is not installed in {sys.executable}: use an environment that has it "
            "(BUILD.md), or `make demo`"
        )
    console()
