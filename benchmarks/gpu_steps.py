"""One contender of benchmarks/gpu.py, in a process of its own:  python -m benchmarks.gpu_steps NAME JSON

It prepares beside others, and asks for the GPU and for quiet (benchmarks/gpu_turns.py). Only our step augments, from a
batch of uint8 images 1.2 times as large as the model's; the peers' images are float and of the model's size. All
batches are on the device before anything is measured.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks.gpu_turns import ask

CLASSES = 404
ROUNDS, SECONDS = 5, 0.6  # of a round, which has at least three steps


def _measured(step: Callable[[], object], wait: Callable[[object], None], batch_size: int) -> dict:
    """`step` starts one and returns what `wait` waits for. As in training, it is started before the last one ends."""
    wait(step())
    start = time.perf_counter()
    wait(step())
    count = min(max(3, round(SECONDS / (time.perf_counter() - start))), 100)
    ask("quiet")
    host, speeds = [], []
    for _ in range(7):  # each waits, or the queue of the device would be timed
        start = time.perf_counter()
        result = step()
        host.append(time.perf_counter() - start)
        wait(result)
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            result = step()
        wait(result)
        speeds.append(count * batch_size / (time.perf_counter() - start))
    return {
        "images/s": statistics.median(speeds),
        "slowest round": min(speeds),
        "fastest round": max(speeds),
        "host ms": 1e3 * statistics.median(host),
    }


def ours(shape: dict, dtype: str, batch_size: int, fields: dict, device: str, kernels_are_chosen: bool = False) -> dict:
    import jax

    from benchmarks.ours import batch_shapes, training_step
    from vit_nabirds.parallel import devices
    from vit_nabirds.training.microbatch import Memory

    mesh, row = devices.make_mesh(), {}
    step, first_state, like = training_step(shape, mesh, {"compute_dtype": dtype} | fields)
    shapes = batch_shapes(shape, batch_size, mesh)
    lowered = step.lower(like, shapes)
    if not kernels_are_chosen:  # XLA times them while it compiles the step, and keeps its choices in the cache
        ask("the GPU")
    try:
        compiled = lowered.compile()
        predicted = Memory.of(compiled).total / 1e9
        row |= {"attention": _attention(compiled.as_text()), "predicted GB": predicted}
        ask("the GPU")
        held = first_state()
        batch = devices.to_devices(_batch(shapes), mesh)

        def one() -> dict:
            nonlocal held
            held, metrics = compiled(held, batch)
            return metrics

        row |= _measured(one, jax.block_until_ready, batch_size)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"images/s": "out of memory"}
    if stats := jax.devices()[0].memory_stats():  # the CPU has none
        peak = stats["peak_bytes_in_use"] / 1e9
        row |= {"peak GB": peak, "peak ÷ predicted": peak / predicted}
    return row


def _batch(shapes: dict) -> dict:
    import numpy as np

    labels = np.arange(*shapes["label"].shape, dtype=np.int32) % CLASSES
    image = np.random.default_rng(0).integers(0, 256, shapes["image"].shape, np.uint8)
    return {"image": image, "label": labels, "row": labels}


def _attention(text: str) -> str:
    """Who computes attention in a compiled program's text. The last block, of one query, is always XLA's."""
    from vit_nabirds.audit.program import fused_attentions

    called = tuple(map(bool, fused_attentions(text)))
    return {(True, True): "cuDNN", (False, False): "XLA"}.get(called, "cuDNN one way, XLA the other")


def timm(shape: dict, **case) -> dict:
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=shape["image_size"], patch_size=shape["patch_size"], embed_dim=shape["hidden_size"],
        depth=shape["num_layers"], num_heads=shape["num_heads"], num_classes=CLASSES,
        mlp_ratio=shape["mlp_dim"] / shape["hidden_size"],
    )  # fmt: skip
    return _torch(vit, lambda logits: logits, shape["image_size"], **case)


def hugging_face(shape: dict, **case) -> dict:
    import torch  # noqa: F401, because without it transformers only has stand-ins
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=shape["image_size"], patch_size=shape["patch_size"], hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_heads"],
        intermediate_size=shape["mlp_dim"], num_labels=CLASSES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return _torch(ViTForImageClassification(config), lambda output: output.logits, shape["image_size"], **case)


def _torch(vit, logits: Callable, image_size: int, dtype: str, batch_size: int, device: str, **_) -> dict:
    """Compiled by Inductor, with bfloat16 by autocast, TF32 in float32, attention by SDPA, and fused AdamW."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {"skipped": "skipped: torch sees no GPU"}
    torch.set_float32_matmul_precision("high")  # TF32, which is JAX's default
    try:
        vit = vit.to(device, memory_format=torch.channels_last).train()
        compiled = torch.compile(vit, backend=_inductor_that_asks)
        optimizer = torch.optim.AdamW(vit.parameters(), 1e-4, weight_decay=0.05, fused=True)
        images = torch.randn(batch_size, 3, image_size, image_size, device=device)
        images = images.to(memory_format=torch.channels_last)
        labels = torch.arange(batch_size, device=device) % CLASSES

        def one() -> torch.Tensor:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = torch.nn.functional.cross_entropy(logits(compiled(images)), labels)
            loss.backward()
            optimizer.step()
            return loss

        row = {"attention": "SDPA"} | _measured(one, lambda loss: _wait(torch, loss), batch_size)
    except torch.OutOfMemoryError:
        return {"images/s": "out of memory", "attention": "SDPA"}
    if device == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def _inductor_that_asks(graph, inputs: list) -> Callable:
    """torch.compile's default, which waits for the GPU between the compilation and the first step."""
    import torch

    torch._functorch.config.force_non_lazy_backward_lowering = True  # or the gradient is compiled in the first step
    # On the CPU this is only tried, and Inductor's compilation would need a C++ compiler and half a minute.
    backend = torch._dynamo.lookup_backend("inductor" if inputs[0].is_cuda else "aot_eager")
    compiled = backend(graph, inputs)
    ask("the GPU")
    return compiled


def _wait(torch, loss) -> None:
    """For the optimizer's step too, which follows the loss."""
    torch.cuda.synchronize() if loss.is_cuda else loss.item()


CONTENDERS = {"ours": ours, "timm": timm, "Hugging Face": hugging_face}

if __name__ == "__main__":
    try:
        answer = CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))
    except ImportError as missing:
        answer = {"skipped": f"skipped: no {missing.name}"}
    print("answer", json.dumps(answer), flush=True)
