"""A grid of captioned pictures."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def draw_grid(images: np.ndarray, captions: list[tuple[str, str]], columns: int = 4) -> np.ndarray:
    """float32 (n, size, size, 3) in [0, 1] -> uint8 (height, width, 3)."""
    side, gap, line = max(images.shape[1], 160), 8, 15
    cell = (side + gap, side + 2 * line + gap)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * cell[0], gap + i // columns * cell[1]
        pixels = Image.fromarray(np.asarray(image * 255 + 0.5).clip(0, 255).astype(np.uint8))
        grid.paste(pixels.resize((side, side), Image.Resampling.NEAREST if side > image.shape[0] else None), (x, y))
        for j, text in enumerate(caption):
            while draw.textlength(text, font) > side:
                text = text.removesuffix("…")[:-1] + "…"
            draw.text((x, y + side + j * line), text, "black" if j == 0 else "dimgray", font)
    return np.asarray(grid)
