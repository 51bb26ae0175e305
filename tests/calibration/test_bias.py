"""Bias correction: every layer's mean output is the float model's."""

import re
import textwrap
from pathlib import Path

import minmax
import torch
from test_stages import calibration, step
from vitq.simulate import recording


def means(model, x) -> dict[str, torch.Tensor]:
    found = {}
    paths = [path for path in model.linears if path.startswith("blocks")]
    with (
        torch.no_grad(),
        recording(
            {path: model.linears[path] for path in paths},
            lambda path, inputs, output: found.__setitem__(path, output.flatten(0, -2).mean(0)),
        ),
    ):
        model(x)
    return found


def test_mean_outputs_are_restored():
    bits = dict.fromkeys(("weights", "activations", "operands", "softmax"), 4)
    c = calibration(minmax.vit(), {"bits": bits, "focus": {"anchor": "absolute", "power": 1.0}}, 16)
    step(c, "initialise", "scales", weights={"method": "minmax"}, activations={"method": "minmax"})
    wanted, before = means(c.reference, c.images), means(c.sim, c.images)
    step(c, "refine", "bias_correction")
    after = means(c.sim, c.images)
    for path, mean in wanted.items():
        assert torch.allclose(after[path], mean, atol=1e-4 * float(mean.abs().max()))
        assert not torch.allclose(before[path], mean, atol=1e-2 * float(mean.abs().max()))


def test_the_worked_example_of_the_contributing_guide_is_this_code():
    root = Path(__file__).parents[2]
    guide = (root / "CONTRIBUTING.md").read_text()
    for language, file in (("python", "stages/bias.py"), ("yaml", "recipes/bias-correction.yaml")):
        (block,) = re.findall(rf"   ```{language}\n(.*?)   ```", guide, re.DOTALL)
        assert textwrap.dedent(block) in (root / "python/vitq" / file).read_text()
