"""What README.md shows works as it stands there."""

import re
from pathlib import Path

import torch
import vitq
from vitq.models.digits_vit import NAME

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    shown = '"vit_small_patch16_224"'
    assert shown in block
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    # A small model whose weights are shipped in place of the one that is downloaded.
    exec(compile(block.replace(shown, repr(NAME)), "README.md", "exec"), names)
    assert isinstance(names["integer"].vitq_config, vitq.checkpoint.Config)
    assert (tmp_path / "out" / "config.json").is_file()
