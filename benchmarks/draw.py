"""A prepared and packed folder of drawn birds for a model of SIZE pixels: python -m benchmarks.draw FOLDER SIZE"""

import sys
from pathlib import Path

from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.synthetic import draw_archive

folder, size, quick = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
draw_archive(folder / "archive", species=8, train=10 if quick else 200, test=4)
prepare(folder / "archive", folder, train_size=round(1.2 * size), test_size=size, pack=True)
