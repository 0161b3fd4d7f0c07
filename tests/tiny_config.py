"""The configuration of a run of 20 tiny steps, for tests of the command line."""

from vit_nabirds import config as config_lib

SHAPE = dict(image_size=16, patch_size=8, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32)
VALIDATION = 1 / 6  # 2 of 12 images of each species


def get_config():
    config = config_lib.default()
    config.model.pretrained = ""
    config.model.update(SHAPE)
    config.data.validation = VALIDATION
    config.batch_size = 8
    config.epochs = 4.0
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup = "2 steps"
    config.log_every = 1
    return config
