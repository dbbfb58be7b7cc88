"""Small real inputs: rendered pictures on disk, a config over them, and the checkpoint inside the package."""

import os
from pathlib import Path

# Before torch is imported: the tests run in parallel, and threads that wait for each other on shared cores crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from data_set import write_config, write_data_set

from pipeline.blip2.embedded import embedded_checkpoint
from pipeline.config import Config, load_config


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return embedded_checkpoint()


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A folder of its own with a data set and `config.yaml` in it; no cache yet."""
    write_data_set(tmp_path)
    write_config(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A config whose cache is finished; shared, so nothing may be changed in it."""
    from pipeline.commands.precompute import precompute

    folder = tmp_path_factory.mktemp("cached")
    write_data_set(folder)
    config = load_config(write_config(folder))
    precompute(config)
    return config
