"""Small copies of photographs for pages, as text that stands in the page itself."""

import base64
import io

import numpy as np
from PIL import Image

SIDE, QUALITY = 160, 78  # pixels; of JPEG: 4 to 8 KB each


def thumbnail(pixels: np.ndarray, side: int = SIDE) -> str:
    """uint8 (height, width, 3) -> the URI of a JPEG of at most so many pixels each way."""
    image, jpeg = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(jpeg, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
