"""Fine-tune Vision Transformers on photographs of birds, on every device you have."""


def __getattr__(name: str):
    if name == "Classifier":  # imported when asked for: a command's messages do not wait for JAX
        from vit_nabirds.evaluation.classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
