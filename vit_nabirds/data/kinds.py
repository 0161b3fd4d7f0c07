"""What a file is, by its first bytes, whatever its name says."""

import re

HEADER = 4096  # how many of them `kind_of` looks at

JPEG = b"\xff\xd8\xff"  # its first bytes
_PICTURES = {  # by Pillow's names
    "JPEG": JPEG,
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "TIFF": rb"(II\*\0(?!....CR)|MM\0\*|II\+\0|MM\0\+)",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "PPM": rb"P([1-6][\s#]|7\n|[fF]\s)",
    "JPEG2000": rb"(\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51)",
    "AVIF": rb"....ftyp(avi[fs]|(mif1|msf1|miaf)(....)*?avi[fs])",
    "HEIF": rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
}
FORMATS = tuple(sorted(_PICTURES))

_TEXT = rb"(\xef\xbb\xbf)?\s*"
_OTHERS = {
    "an empty file": rb"\Z",
    "nothing but zeros": rb"\0+\Z",
    "an HTML page": _TEXT + rb"(<!--.*?-->\s*)?<(?i:!doctype html|html|head|body|title|meta|script)",
    "an SVG drawing": _TEXT + rb"<(svg|(\?xml|!doctype|!--).*?<(\w+:)?svg|!DOCTYPE svg)",
    "an XML file": _TEXT + rb"<(\?xml|\w+[\s>])",
    "a PDF document": rb".{0,1000}?%PDF-",
    "a PostScript file": rb"(\s*%!|\xc5\xd0\xd3\xc6)",
    "a Git LFS pointer (git lfs pull fetches the file)": rb"version https://git-lfs",
    "macOS metadata (the picture has the same name without ._)": rb"\0\x05\x16\x07",
    "a camera's raw file (export it as JPEG)": rb"(....ftypcrx|II\*\0....CR|IIRO|IIU\0|FUJIFILMCCD-RAW|FOVb|\0MRM)",
    "a JPEG XL file (convert it to JPEG or PNG)": rb"(\xff\x0a|\0\0\0\x0cJXL )",
    "a Photoshop document (export it as JPEG or PNG)": rb"8BPS",
    "an icon": rb"\0\0[\x01\x02]\0.\0",
    "a video": rb"(....(ftyp|moov|mdat)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|\0\0\x01[\xb3\xba])",
    "a sound file": rb"(ID3|OggS|fLaC|RIFF....WAVE)",
    "a ZIP archive": rb"PK(\x03\x04|\x05\x06)",
    "a compressed file": rb"(\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|.{257}ustar)",
    "a data file": rb"(\x93NUMPY|PAR1|\x89HDF\r\n)",
    "an Office document": rb"\xd0\xcf\x11\xe0",
    "a program": rb"(MZ|\x7fELF)",
    "a JSON file": _TEXT + rb"[\[{]\s*[\"\[{\d\]}]",
    "text": _TEXT + rb"[\t\n\f\r -~\x80-\xf7]*\Z",
}
_PICTURES, _OTHERS = (
    {kind: re.compile(pattern, re.DOTALL) for kind, pattern in table.items()} for table in (_PICTURES, _OTHERS)
)


def kind_of(start: bytes) -> str:
    """One of FORMATS, for the first bytes of a file. Raises ValueError that says what it is instead of a picture.

    A JPEG may start a little later, after unknown bytes, which viewers skip.
    """
    for kind, pattern in _PICTURES.items():
        if pattern.match(start):
            return kind
    other = next((kind for kind, pattern in _OTHERS.items() if pattern.match(start)), "")
    if not other and 0 <= start.find(JPEG, 0, 1024):
        return "JPEG"
    raise ValueError(f"{other + ', ' if other else ''}not a picture in one of the formats {', '.join(FORMATS)}")
