"""Markdown for the trackers."""


def as_table(rows: list[tuple], head: tuple[str, ...]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: object) -> str:
    """Nothing in it is Markdown or HTML."""
    text = " ".join(str(value).split())
    for character, written in {"&": "&amp;", "<": "&lt;", "|": "&#124;", "*": "&#42;", "`": "&#96;"}.items():
        text = text.replace(character, written)
    return text
