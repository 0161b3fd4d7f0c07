"""Logits of transformers' torch classes with random weights, for a test environment without torch.

To compute them again, in a separate environment (`pip install torch==2.14.1 transformers==4.57.6`):

    python tests/reference_logits.py [FOLDER OF A DINOV2-SMALL]
"""

import sys
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("reference_logits.npz")
SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, num_labels=6)
# Name: model_type, fields of its config.json. Images have 224 px; positions for another image_size are resized.
CASES = {
    "vit without bias": ("vit", SMALL | dict(intermediate_size=96, qkv_bias=False, patch_size=16)),
    "vit, resized": ("vit", SMALL | dict(intermediate_size=96, image_size=96, patch_size=16)),
    "dinov2": ("dinov2", SMALL | dict(image_size=224, patch_size=14)),
    "dinov2, resized from 518": ("dinov2", SMALL | dict(image_size=518, patch_size=14)),
    "dinov2, resized from 126": ("dinov2", SMALL | dict(image_size=126, patch_size=14)),
    "dinov2 with SwiGLU": ("dinov2", SMALL | dict(image_size=224, patch_size=14, use_swiglu_ffn=True)),
    "registers": ("dinov2_with_registers", SMALL | dict(image_size=224, patch_size=14)),
    "registers, resized from 518": ("dinov2_with_registers", SMALL | dict(image_size=518, patch_size=14)),
    "registers, resized from 126": ("dinov2_with_registers", SMALL | dict(image_size=126, patch_size=14)),
}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 values that depend on the name: near 1 for scales, else large enough to matter."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    scales = ("lambda1", "norm.weight", "norm1.weight", "norm2.weight", "before.weight", "after.weight")
    return (1 + 0.2 * values if name.endswith(scales) else 0.1 * values).astype(np.float32)


def images() -> np.ndarray:
    """float32 (2, 224, 224, 3)."""
    return np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)


def main() -> None:
    import torch
    import transformers

    pixels = torch.from_numpy(images().transpose(0, 3, 1, 2).copy())
    results = {}
    for name, (model_type, fields) in CASES.items():
        config = transformers.AutoConfig.for_model(model_type, **fields)
        model = transformers.AutoModelForImageClassification.from_config(config).eval()
        tensors = {key: torch.from_numpy(drawn(key, tuple(x.shape))) for key, x in model.state_dict().items()}
        model.load_state_dict(tensors, strict=True)
        resized = dict(interpolate_pos_encoding=True) if name == "vit, resized" else {}
        with torch.no_grad():
            results[name] = model(pixels, **resized).logits.numpy()
            if "resized" in name:
                embeddings = getattr(model, model_type).embeddings
                tokens = (224 // fields["patch_size"]) ** 2 + 1
                positions = embeddings.interpolate_pos_encoding(torch.zeros(1, tokens, 48), 224, 224)
                results[name + ": positions"] = positions[..., :8].numpy()
    if sys.argv[1:]:
        model = transformers.Dinov2Model.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
        with torch.no_grad():
            results["dinov2-small"] = model(pixels).last_hidden_state[:, 0].numpy()
    np.savez_compressed(FILE, **results)


if __name__ == "__main__":
    main()
