"""Small checkpoints, and engines for them."""

import pytest
import torch
from loopback import quantized
from vitq import Engine, checkpoint


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> list[str]:
    """Two checkpoints of one shape."""
    found = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("serving") / f"model{seed}"
        checkpoint.save(folder, quantized(seed))
        found.append(str(folder))
    return found


@pytest.fixture(scope="session")
def references(folders) -> list:
    """What they compute, image by image."""
    models = [checkpoint.load(folder) for folder in folders]

    def function(model):
        @torch.inference_mode()
        def logits(images):
            return torch.cat([model(image[None]) for image in images])

        return logits

    return [function(model) for model in models]


@pytest.fixture
def engine(folders):
    with Engine(folders[0], buckets=(1, 2, 4, 8), max_queue=64) as running:
        yield running
