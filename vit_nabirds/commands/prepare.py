"""Crop the photographs of a data set to their birds, ready for training."""

REQUIRED = ("archive", "out")
FLAGS = {
    "archive": (str, "Folder (NABirds, CUB-200-2011, a folder for each class), table (.csv, .parquet) or COCO .json."),
    "out": (str, "Folder to write metadata.parquet and cleaned_images/ to."),
    "metadata_only": (False, "Write metadata.parquet alone."),
    "pack": (False, "Write packed/ too: all images of a split in one file, read without decoding."),
    "test_share": (float, "Share of the photographs to test on, where the archive does not say which: like 0.2."),
    "crop": ("box", "'box' crops to the bird, 'none' takes whole photographs."),
    "train_size": (269, "Side of a training image in pixels; training crops at random from it."),
    "test_size": (224, "Side of a test image in pixels: the model's image size."),
    "margin": (0.2, "Margin around a training bird, as a share of its box on each side."),
    "on_error": ("raise", "What to do about photographs that cannot be used: 'raise' lists them all, 'skip' goes on."),
    "max_skipped": (0.01, "Largest share of the photographs that 'skip' may leave out."),
    "max_pixels": (500_000_000, "Largest photograph to decode, in pixels."),
}
PARALLEL = False
CONFIGURED = ""


def run(options, group) -> int:
    from vit_nabirds.data.prepare import prepare

    names = FLAGS.keys() - {"archive", "out"}
    prepare(options.archive, options.out, **{name: options[name].value for name in names})
    return 0
