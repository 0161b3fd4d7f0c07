"""What a transformer may be: checked before anything is made of its sizes, which may come from a stranger's file."""

import math

# The largest of each; those of research are half of it at most. To describe 100 layers takes most of a minute, and the
# time grows with the square of their number.
LARGEST = {
    "in_channels": 3, "image_size": 16_384, "patch_size": 1_024, "hidden_size": 65_536, "num_layers": 100,
    "num_heads": 4_096, "mlp_dim": 524_288, "num_registers": 1_024,
}  # fmt: skip
MOST_PATCHES = 65_536
MULTIPLES = {"image_size": "patch_size", "hidden_size": "num_heads"}


def problem_of(architecture: dict) -> tuple[str, str] | None:
    """The first argument of `VisionTransformer` that is none, and what it must be; None if all are right."""
    for name, largest in LARGEST.items():
        least = 0 if name == "num_registers" else largest if name == "in_channels" else 1
        if type(value := architecture.get(name)) is not int or not least <= value <= largest:
            return name, f"a whole number from {least:,} to {largest:,}" if least < largest else f"{least}"
    for name, divisor in MULTIPLES.items():
        if architecture[name] % architecture[divisor]:
            return name, f"a multiple of {divisor}, which is {architecture[divisor]}"
    if (architecture["image_size"] // architecture["patch_size"]) ** 2 > MOST_PATCHES:
        most = math.isqrt(MOST_PATCHES) * architecture["patch_size"]
        return "image_size", f"at most {most:,} for patches of {architecture['patch_size']}"
    for name in ("qkv_bias", "layer_scale", "gated"):
        if type(architecture.get(name)) is not bool:
            return name, "true or false"
    epsilon = architecture.get("layer_norm_eps")
    if type(epsilon) not in (int, float) or not 0 < epsilon <= 1:
        return "layer_norm_eps", "above 0 and at most 1"
    return None if architecture.get("pool") in ("cls", "cls+mean") else ("pool", "'cls' or 'cls+mean'")
