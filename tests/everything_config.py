"""Every part of the recipe at once, on the 20 tiny steps of tiny_config.py; LoRA is added by flags."""

from vit_nabirds import config as config_lib


def get_config():
    config = config_lib.default()
    config.batch_size, config.microbatch, config.epochs, config.ema_decay, config.log_every = 8, 2, 4.0, 0.9, 1
    config.mesh.fsdp, config.remat = 2, "blocks"
    config.data.update(validation=1 / 6, repeats=2, sampling="sqrt")
    config.model.update(
        pretrained="", image_size=16, patch_size=8, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32,
        dropout_rate=0.1, drop_path=0.2, head_stddev=0.1,
    )  # fmt: skip
    config.augment.update(
        crop="resized", area=(0.3, 1.0), color_jitter=0.2, policy="randaugment", erasing=0.3, mixup=0.4, cutmix=1.0
    )
    config.loss.update(name="binary", label_smoothing=0.1)
    config.optimizer.update(
        name="muon", learning_rate=1e-3, layer_decay=0.8, weight_decay=0.05, clip_norm=1.0, moment_dtype="bfloat16",
        schedule="constant", warmup="2 steps", cooldown="5 steps", rules="classifier/bias lr=0.5 wd=0.01; norm1 frozen",
    )  # fmt: skip
    config.evaluate.update(every="5 steps", views="flip", select="loss")
    config.checkpoint.every = "5 steps"
    return config
