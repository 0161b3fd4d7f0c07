"""Crop the photographs of an NABirds archive to their birds, ready for training."""

REQUIRED = ("archive", "out")
FLAGS = {
    "archive": (str, "Folder of the unpacked NABirds archive."),
    "out": (str, "Folder to write metadata.parquet and cleaned_images/ to."),
    "metadata_only": (False, "Write metadata.parquet alone."),
    "pack": (False, "Write packed/ too: all images of a split in one file, read without decoding."),
    "train_size": (269, "Side of a training image in pixels; training crops at random from it."),
    "test_size": (224, "Side of a test image in pixels: the model's image size."),
    "margin": (0.2, "Margin around a training bird, as a share of its box on each side."),
}
PARALLEL = False
CONFIGURED = False


def run(options, group) -> int:
    from vit_nabirds.data.prepare import prepare

    names = ("metadata_only", "pack", "train_size", "test_size", "margin")
    prepare(options.archive, options.out, **{name: options[name].value for name in names})
    return 0
