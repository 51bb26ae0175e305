"""What the linear ops refuse, and what they say."""

import pytest
import torch
from test_qlinear import INT8

import vitq_kernels as vk


def _tiny(**changes):
    x = vk.QTensor(torch.zeros(2, 8, dtype=torch.int8), torch.ones(1), 0, torch.zeros(2, 3))
    weight = vk.pack_weight(torch.zeros(4, 8, dtype=torch.int8), 8, INT8)
    return {"x": x, "weight": weight, "weight_scale": torch.ones(4), **changes}


def _wide(k):
    x = vk.QTensor(torch.zeros(2, k, dtype=torch.int8), torch.ones(1))
    return {"x": x, "weight": vk.pack_weight(torch.zeros(4, k, dtype=torch.int8), 8, INT8)}


BAD = (
    (lambda: vk.qlinear(**_tiny(x=torch.zeros(2, 8))), TypeError, "x is Tensor, expected a QTensor"),
    (lambda: vk.qlinear(**_tiny(weight_scale=torch.ones(3))), ValueError, r"weight_scale has shape \(3,\)"),
    (lambda: vk.qlinear(**_tiny(bias=torch.ones(5))), ValueError, r"bias has shape \(5,\)"),
    (lambda: vk.qlinear(**_tiny(activation="relu")), ValueError, "activation is 'relu', expected one of none"),
    (lambda: vk.qlinear(**_tiny(lora_up=torch.ones(4, 9))), ValueError, r"t has shape \(2, 3\)"),
    (lambda: vk.qlinear(**_tiny(residual=torch.ones(2, 5))), ValueError, "residual has shape"),
    (lambda: vk.qlinear(**_tiny(layer_scale=torch.ones(4).int())), TypeError, "layer_scale has dtype"),
    (
        lambda: vk.qlinear(**_tiny(x=vk.QTensor(torch.zeros(2, 7, dtype=torch.int8), torch.ones(1)))),
        ValueError,
        r"x has shape \(2, 7\), expected \[..., 8\]",
    ),
    (
        lambda: vk.qlinear(**_tiny(x=vk.QTensor(torch.zeros(2, 8, dtype=torch.int8), torch.ones(3)))),
        ValueError,
        "x.scale has shape",
    ),
    (lambda: vk.qlinear(**_tiny(out_dtype=torch.int8)), TypeError, "out_dtype is torch.int8, expected torch.float32"),
    (lambda: vk.qlinear(**_tiny(**_wide(65794))), ValueError, "weight has 65794 in features, expected at most 65793"),
    (
        lambda: vk.qlinear_weight_only(torch.zeros(2, 8), _tiny()["weight"], torch.ones(4), out_dtype=torch.float64),
        TypeError,
        "out_dtype is torch.float64, expected torch.float32",
    ),
)


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_wrong_layout_is_refused_with_every_reason():
    weight = vk.pack_weight(torch.zeros(4, 8, dtype=torch.int8), 8, "int8")
    with (
        vk.backend("cpu"),
        pytest.raises(ValueError, match="cpu: reads weight layouts int8_n16k4, int4_n16k4, not int8"),
    ):
        vk.qlinear(**_tiny(weight=weight))
