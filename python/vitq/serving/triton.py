"""A checkpoint as a folder of a Triton Inference Server model repository.

``<name>/config.pbtxt``, ``<name>/1/model.py`` (Python backend) and ``<name>/1/checkpoint``; ``labels.txt`` where
classes have names. Whoever serves it needs vitq in the Python that Triton's Python backend runs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ..checkpoint import CONFIG, Config, read_config
from .engine import BUCKETS
from .protocol import INPUT, OUTPUT

MODEL = Path(__file__).parents[1] / "assets" / "triton_model.py"


def write(
    checkpoint: str | os.PathLike, target: str | os.PathLike, device: str, dtype: str, *, overwrite: bool = False
) -> None:
    """Write the model folder ``target``, whose name is the model's, in one step.

    Args:   device: cpu or cuda (an instance per GPU); dtype: of activations, such as float16.
    Raises: CheckpointError; ValueError: something is there already; OSError: the file system's own complaint.
    """
    target, config = Path(target), read_config(checkpoint)
    if target.exists() and not overwrite:
        raise ValueError(f"'{target}' exists already, expected a new folder (or overwrite)")
    if target.exists() and not (target / "config.pbtxt").is_file():
        raise ValueError(f"'{target}' is no folder of a Triton model repository; it is not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as folder:
        made, version = Path(folder) / target.name, Path(folder) / target.name / "1"
        (version / "checkpoint").mkdir(parents=True)
        for file in (CONFIG, config.weights.file):  # alone: the target may lie in the same folder
            shutil.copy(Path(checkpoint) / file, version / "checkpoint")
        shutil.copy(MODEL, version / "model.py")
        (made / "config.pbtxt").write_text(configuration(config, target.name, device, dtype))
        if config.data.class_names is not None:
            (made / "labels.txt").write_text("\n".join(config.data.class_names) + "\n", encoding="utf-8")
        old = Path(folder) / "old"
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(made, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise


def configuration(config: Config, name: str, device: str, dtype: str) -> str:
    """``config.pbtxt``."""
    shape = ", ".join(map(str, config.data.input_size))
    labels = "" if config.data.class_names is None else '\n    label_filename: "labels.txt"'
    return f"""name: "{name}"
backend: "python"
max_batch_size: {BUCKETS[-1]}
input [
  {{
    name: "{INPUT}"
    data_type: TYPE_FP32
    dims: [ {shape} ]
  }}
]
output [
  {{
    name: "{OUTPUT}"
    data_type: TYPE_FP32
    dims: [ {config.data.num_classes} ]{labels}
  }}
]
dynamic_batching {{
  max_queue_delay_microseconds: 1000
}}
instance_group [
  {{
    count: 1
    kind: {"KIND_GPU" if device.startswith("cuda") else "KIND_CPU"}
  }}
]
parameters {{
  key: "dtype"
  value: {{ string_value: "{dtype}" }}
}}
parameters {{
  key: "buckets"
  value: {{ string_value: "{",".join(map(str, BUCKETS))}" }}
}}
"""
