"""Every part of the recipe at once, as far as they go together, on 20 tiny steps."""

from tiny_config import get_config as tiny


def get_config():
    config = tiny()
    config.microbatch, config.mesh.fsdp, config.remat, config.ema_decay = 2, 2, "blocks", 0.9
    config.data.repeats, config.data.sampling = 2, "sqrt"
    config.model.dropout_rate, config.model.drop_path, config.model.head_stddev = 0.1, 0.2, 0.1
    config.augment.update(
        crop="resized", area=(0.3, 1.0), color_jitter=0.2, policy="randaugment", erasing=0.3, mixup=0.4, cutmix=1.0
    )
    config.loss.update(name="binary", label_smoothing=0.1)
    config.optimizer.update(
        name="muon", learning_rate=1e-3, layer_decay=0.8, schedule="constant", cooldown="5 steps", clip_norm=1.0,
        moment_dtype="bfloat16", rules="position_embeddings lr=0.5 wd=0.01; cls_token frozen",
    )  # fmt: skip
    config.evaluate.update(every="5 steps", views="ten", select="loss")
    config.checkpoint.every = "5 steps"
    return config
