"""The head alone on frozen features: the quickest look at what a checkpoint knows of a data set.

    python main.py --config=configs/linear_probe.py --workdir=runs/probe \\
        --config.data.root=data/birds10 --config.model.pretrained=vit-small-patch14-224
"""

from vit_nabirds import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.root = "data/birds60"
    config.trainable = "classifier"
    config.cpu_devices = 2
    config.batch_size = 16
    config.epochs = 10.0
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup = "1 epoch"
    config.optimizer.clip_norm = 1.0
    config.evaluate.every = "2 epochs"
    config.log_every = 10
    return config
