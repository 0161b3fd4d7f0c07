"""One step of fine-tuning a ViT in float32 with AdamW, ours and those of the peers; libraries are imported by need."""

import resource
import sys
import time
from collections.abc import Callable

SPEED = ["ours", "ours on 2 devices", "seed: nnx.jit", "Hugging Face Flax", "torch with timm", "seed without dropout"]
HOST = ["ours", "seed: nnx.jit"]


def flops_of_model(shape: dict) -> int:
    """Of the products of all blocks for all tokens of one image, forwards and backwards."""
    width, patches = shape["hidden_size"], (shape["image_size"] // shape["patch_size"]) ** 2
    layer = 2 * (patches + 1) * width * (4 * width + 2 * shape["mlp_dim"] + 2 * (patches + 1))
    return 3 * (shape["num_layers"] * layer + 2 * patches * 3 * shape["patch_size"] ** 2 * width)


def _of_gpu(shape: dict, images_per_second: float) -> dict:
    """Peak memory of a GPU that JAX uses, and the part of its peak that the model's products reach."""
    jax = sys.modules.get("jax")
    if jax is None or jax.default_backend() != "gpu":
        return {}
    from vit_nabirds.parallel.gpus import peak_of

    device = jax.devices()[0]
    peak = peak_of(device.device_kind, "float32") or float("nan")
    mfu = images_per_second * flops_of_model(shape) / (peak * jax.device_count())
    return {"peak GB": device.memory_stats()["peak_bytes_in_use"] / 1e9, "MFU": mfu}


def _measured(
    step: Callable[[], object], wait: Callable[[object], None], shape: dict, batch_size: int, count: int
) -> Callable:
    """`step` starts one and returns what `wait` waits for. The first, which compiles, is not counted in a round."""
    start = time.perf_counter()
    wait(step())
    first = time.perf_counter() - start

    def measure() -> dict:
        seconds, host = 0.0, []
        for warm in [False] + [True] * count:
            start = time.perf_counter()
            result = step()
            host.append(time.perf_counter() - start)
            wait(result)
            seconds += (time.perf_counter() - start) * warm
        return {
            "images/s": count * batch_size / seconds,
            "host ms/step": 1e3 * sorted(host)[len(host) // 2],
            "compilation and first step s": first,
            "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        } | _of_gpu(shape, count * batch_size / seconds)

    return measure


def _ours(cpu_devices: int, shape: dict, batch_size: int, count: int) -> Callable:
    """With augmentation of uint8 images 1.2 times as large, which the others leave out."""
    import jax
    import numpy as np

    from benchmarks.ours import batch_shapes, training_step
    from vit_nabirds.parallel import devices

    devices.split_cpu(cpu_devices)
    mesh = devices.make_mesh()
    step, first_state, _ = training_step(shape, mesh)
    held = first_state()
    shapes = batch_shapes(shape, batch_size, mesh)
    image = np.random.default_rng(0).integers(0, 256, shapes["image"].shape, np.uint8)
    labels = np.arange(batch_size, dtype=np.int32)
    batch = devices.to_devices({"image": image, "label": labels, "row": labels}, mesh)
    compiled = None

    def one() -> tuple:
        nonlocal held, compiled
        compiled = compiled or step.lower(held, batch).compile()  # as in training
        held, metrics = compiled(held, batch)
        return held, metrics

    return _measured(one, jax.block_until_ready, shape, batch_size, count)


def ours(**arguments) -> Callable:
    return _ours(1, **arguments)


def ours_on_2_devices(**arguments) -> Callable:
    return _ours(2, **arguments)


def seed(**arguments) -> Callable:
    """As the course page that this project grew from has it: modules as arguments of `nnx.jit`, dropout of 0.1."""
    return _seed(0.1, **arguments)


def seed_without_dropout(**arguments) -> Callable:
    return _seed(0.0, **arguments)


def _seed(dropout: float, shape: dict, batch_size: int, count: int) -> Callable:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    width, size, patch = shape["hidden_size"], shape["image_size"], shape["patch_size"]

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(
                num_heads=shape["num_heads"], in_features=width, dropout_rate=dropout, broadcast_dropout=False,
                decode=False, deterministic=False, rngs=rngs,
            )  # fmt: skip
            self.mlp = nnx.Sequential(
                nnx.Linear(width, shape["mlp_dim"], rngs=rngs),
                nnx.gelu,
                nnx.Dropout(dropout, rngs=rngs),
                nnx.Linear(shape["mlp_dim"], width, rngs=rngs),
                nnx.Dropout(dropout, rngs=rngs),
            )

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class ViT(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.patches = nnx.Conv(3, width, (patch, patch), strides=(patch, patch), padding="VALID", rngs=rngs)
            self.cls = nnx.Param(jnp.zeros((1, 1, width)))
            self.positions = nnx.Param(jnp.zeros((1, (size // patch) ** 2 + 1, width)))
            self.blocks = nnx.Sequential(*[Block(rngs) for _ in range(shape["num_layers"])])
            self.dropout = nnx.Dropout(dropout, rngs=rngs)
            self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 404, rngs=rngs)

        def __call__(self, images: jax.Array) -> jax.Array:
            x = self.patches(images).reshape(len(images), -1, width)
            x = jnp.concatenate([jnp.broadcast_to(self.cls[...], (len(x), 1, width)), x], axis=1) + self.positions[...]
            return self.head(self.norm(self.blocks(self.dropout(x)))[:, 0])

    @nnx.jit
    def train_step(model: nnx.Module, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, batch: dict) -> None:
        def loss_fn(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
            logits = model(batch["img"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), logits

        (loss, logits), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, gradients)

    vit = ViT(nnx.Rngs(0))
    optimizer = nnx.Optimizer(vit, optax.adamw(1e-4, weight_decay=0.05), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    batch = {"img": jax.random.normal(jax.random.key(0), (batch_size, size, size, 3)), "label": jnp.arange(batch_size)}

    def one() -> object:
        train_step(vit, optimizer, metrics, batch)
        return nnx.state(vit)

    return _measured(one, jax.block_until_ready, shape, batch_size, count)


def hugging_face_flax(shape: dict, batch_size: int, count: int) -> Callable:
    """transformers 4's linen module, jitted, its state donated."""
    import jax
    import jax.numpy as jnp
    import optax
    from transformers import FlaxViTForImageClassification, ViTConfig

    config = ViTConfig(
        image_size=shape["image_size"], patch_size=shape["patch_size"], hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_heads"],
        intermediate_size=shape["mlp_dim"], num_labels=404, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    vit = FlaxViTForImageClassification(config)
    tx = optax.adamw(1e-4, weight_decay=0.05)
    images = jax.random.normal(jax.random.key(0), (batch_size, 3, shape["image_size"], shape["image_size"]))
    labels = jnp.arange(batch_size)

    def train_step(params: dict, opt_state: tuple) -> tuple:
        def loss_fn(params: dict) -> jax.Array:
            logits = vit(images, params=params, train=False).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    jitted = jax.jit(train_step, donate_argnums=(0, 1))
    held = (jax.tree.map(jnp.array, vit.params), tx.init(vit.params))

    def one() -> object:
        nonlocal held
        *held, loss = jitted(*held)
        return held, loss

    return _measured(one, jax.block_until_ready, shape, batch_size, count)


def torch_with_timm(shape: dict, batch_size: int, count: int) -> Callable:
    import timm
    import torch

    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=shape["image_size"], patch_size=shape["patch_size"], embed_dim=shape["hidden_size"],
        depth=shape["num_layers"], num_heads=shape["num_heads"], num_classes=404,
        mlp_ratio=shape["mlp_dim"] / shape["hidden_size"],
    )  # fmt: skip
    optimizer = torch.optim.AdamW(vit.parameters(), 1e-4, weight_decay=0.05)
    images = torch.randn(batch_size, 3, shape["image_size"], shape["image_size"])
    labels = torch.arange(batch_size)

    def one() -> object:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(vit(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return _measured(one, lambda loss: loss.item(), shape, batch_size, count)


CONTENDERS = dict(
    zip(
        SPEED,
        [ours, ours_on_2_devices, seed, hugging_face_flax, torch_with_timm, seed_without_dropout],
        strict=True,
    )
)
