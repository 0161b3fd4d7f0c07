"""Slurm for the tests, or the reason why there is none."""

import shutil

import pytest
from real_slurm import NEEDED, Slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        pytest.skip(f"needs a Slurm of its own: {', '.join(missing)} not found (apt install slurm-wlm munge)")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
