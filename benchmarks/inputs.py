"""Images a second from a prepared folder to a batch in the host's memory, ours and those of the peers.

`augmented`: crop, flip, contrast, gamma and normalisation are counted too, for ours in one jitted call on the CPU.
"""

import atexit
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HOST = ["ours packed", "ours from JPEG", "decoding alone", "copying alone"]
AUGMENTED = ["ours augmented", "ours packed augmented", "torch", "torch, 2 workers", "seed"]


def _measured(batches: Iterator, batch_size: int, count: int, skip: int = 10) -> Callable:
    """`skip` batches are not counted: as many and more may have been fetched while another was measured."""

    def measure() -> dict:
        for _ in range(skip):
            next(batches)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        return {"images/s": count * batch_size / (time.perf_counter() - start)}

    return measure


def open_images(root: str | Path, packed: bool):
    from absl import flags

    from vit_nabirds.data.photographs import open_split
    from vit_nabirds.data.table import read_table

    flags.FLAGS.mark_as_parsed()
    root = Path(root).resolve()
    if not packed:  # the same folder without its packed form
        bare = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, bare)
        for name in ("metadata.parquet", "prepared.json", "cleaned_images"):
            (bare / name).symlink_to(root / name)
        root = bare
    return open_split(root, read_table(root), "train")


def _batches(images, batch_size: int) -> Iterator[dict]:
    import grain

    from vit_nabirds.data.batches import train_batches

    return train_batches(images, batch_size, 0, 0, -1, grain.sharding.NoSharding())


def ours(root: str, batch_size: int, count: int) -> Callable:
    return _measured(_batches(open_images(root, packed=False), batch_size), batch_size, count)


def ours_packed(root: str, batch_size: int, count: int) -> Callable:
    """From the second pass on: in the first, the checksum of each image is computed too."""
    batches = _batches(images := open_images(root, packed=True), batch_size)
    for _ in range(-(-2 * len(images) // batch_size)):
        next(batches)
    return _measured(batches, batch_size, 20 * count)


def _augmented(packed: bool, root: str, batch_size: int, count: int) -> Callable:
    import jax
    import jax.numpy as jnp

    from vit_nabirds.config.fields import Augment
    from vit_nabirds.models.normalization import Normalization, zscore
    from vit_nabirds.recipe.augmentation import augment, image_keys

    @jax.jit
    def step(images: jax.Array, key: jax.Array) -> jax.Array:
        keys = image_keys(key, jnp.arange(len(images)))
        return zscore(augment(images, keys, 224 * images.shape[1] // 269, Augment()), Normalization())

    def batches() -> Iterator[jax.Array]:
        for number, batch in enumerate(_batches(open_images(root, packed), batch_size)):
            yield jax.block_until_ready(step(batch["image"], jax.random.key(number)))

    return _measured(batches(), batch_size, count)


def ours_augmented(**arguments) -> Callable:
    return _augmented(False, **arguments)


def ours_packed_augmented(**arguments) -> Callable:
    return _augmented(True, **arguments)


def decoding(root: str, batch_size: int, count: int) -> Callable:
    """simplejpeg in a thread for each core, images thrown away."""
    from concurrent.futures import ThreadPoolExecutor

    import simplejpeg

    images = open_images(root, packed=False)
    files = [images.images.folder / path for path in images.images.paths]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def decode(part: list[Path]) -> None:
        for file in part:
            simplejpeg.decode_jpeg(file.read_bytes(), strict=True)

    def measure() -> dict:
        many = list(itertools.islice(itertools.cycle(files), count * batch_size))
        start = time.perf_counter()
        list(pool.map(decode, [many[i : i + batch_size] for i in range(0, len(many), batch_size)]))
        return {"images/s": len(many) / (time.perf_counter() - start)}

    return measure


def copying(root: str, batch_size: int, count: int) -> Callable:
    """The same batch from one place in memory to another."""
    import numpy as np

    size = open_images(root, packed=True).size
    source, target = (np.ones((batch_size, size, size, 3), np.uint8) for _ in range(2))

    def batches() -> Iterator[None]:
        while True:
            yield np.copyto(target, source)

    return _measured(batches(), batch_size, 20 * count)


def seed(root: str, batch_size: int, count: int) -> Callable:
    """As the course page that this project grew from has it: a transform for each image, with keys of the module."""
    import dm_pix as pix
    import grain.python as grain
    import imageio.v3 as iio
    import jax
    import numpy as np

    images = open_images(root, packed=False)
    crop = 224 * images.size // 269
    keys = jax.random.split(jax.random.key(31), 4)

    class Source:
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> dict:
            return {
                "img": iio.imread(images.images.folder / images.path(index)),
                "species_id": images.labels[index],
            }

    def transform(function: Callable) -> grain.MapTransform:
        class Transform(grain.MapTransform):
            def map(self, element: dict) -> dict:
                return element | {"img": function(element["img"])}

        return Transform()

    steps = [
        lambda image: np.asarray(image, np.float32) / 255,
        lambda image: pix.random_crop(keys[0], image, (crop, crop, 3)),
        lambda image: pix.random_flip_left_right(keys[1], image),
        lambda image: pix.random_contrast(keys[2], image, 0.8, 1.2),
        lambda image: pix.random_gamma(keys[3], image, 0.6, 1.2),
        lambda image: (image - np.full(3, 0.5, np.float32)) / np.full(3, 0.5, np.float32),
    ]
    loader = grain.DataLoader(
        data_source=Source(),
        sampler=grain.IndexSampler(len(images), shuffle=True, seed=0, num_epochs=None),
        operations=[*map(transform, steps), grain.Batch(batch_size, drop_remainder=True)],
        worker_count=0,
    )
    return _measured(iter(loader), batch_size, max(1, count // 16), skip=1)


def _torch(workers: int, root: str, batch_size: int, count: int) -> Callable:
    import pathlib

    import torch
    import torchvision
    from torchvision.transforms import v2

    files = sorted(pathlib.Path(root, "cleaned_images").glob("*/*"))
    side = torchvision.io.decode_image(str(files[0])).shape[-1]
    files = [file for file in files if torchvision.io.decode_image(str(file)).shape[-1] >= side][:1000]
    crop = 224 * side // 269
    transform = v2.Compose(
        [
            v2.RandomCrop(crop),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(contrast=(0.8, 1.2)),
            lambda image: v2.functional.adjust_gamma(image, float(torch.empty(1).uniform_(0.6, 1.2))),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    images = torchvision.datasets.folder.default_loader

    class Birds(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> tuple:
            return transform(images(str(files[index]))), 0

    loader = torch.utils.data.DataLoader(
        Birds(), batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    batches = itertools.chain.from_iterable(iter(lambda: iter(loader), None))
    return _measured(batches, batch_size, count)


def torch(**arguments) -> Callable:
    return _torch(0, **arguments)


def torch_2_workers(**arguments) -> Callable:
    return _torch(2, **arguments)


ONE_CORE = ["ours packed on one core"]
CONTENDERS = dict(zip([*ONE_CORE, *HOST], [ours_packed, ours_packed, ours, decoding, copying], strict=True)) | dict(
    zip(AUGMENTED, [ours_augmented, ours_packed_augmented, torch, torch_2_workers, seed], strict=True)
)
