"""Sixty species."""

from vit_nabirds import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.root = "data/birds60"
    config.batch_size = 16
    config.epochs = 6.0
    config.optimizer.learning_rate = 2e-5
    config.optimizer.head_multiplier = 500.0
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup = "10 steps"
    config.log_every = 10
    return config
