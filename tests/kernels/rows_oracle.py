"""What a GPU's quantizing epilogues may return, with a branch in any dtype, subspaces, groups and tables."""

import torch

from vitq_kernels.testing import ROUNDOFF, assert_codes_match, assert_within, gamma


def assert_quantized(out, y, bound, a):
    """``out`` is ``a`` of float64 ``y`` [M, K], known to ``bound``; the branch rounds its operands to its own dtype."""
    m, k = y.shape
    if a.lora_down is not None:
        d, rank = a.lora_down.double(), a.lora_down.shape[0]
        u = 0.0 if a.lora_down.dtype == torch.float32 else ROUNDOFF[a.lora_down.dtype]
        t = y @ d.T
        t_bound = (bound + u * (y.abs() + bound)) @ d.abs().T + gamma(k + 1) * 1.01 * (y.abs() @ d.abs().T)
        if a.subspace:
            t_bound = t_bound + u * (t.abs() + t_bound) + 2.0**-25  # of the smallest float16
            assert torch.equal(out.t, out.t.to(a.lora_down.dtype).float())
        assert_within(out.t, t, t_bound, "t")
        if a.subspace:
            bound = bound + gamma(rank + 2) * (out.t.double().abs() @ d.abs() + y.abs())
            y = y - out.t.double() @ d
    low, high = a.qmin - a.zero_point, a.qmax - a.zero_point
    if a.row_qmax is not None:
        high = a.row_qmax.double()[:, None]
        low = -high
    grouped = y.reshape(m, a.groups, -1)
    bounds = torch.as_tensor(bound, dtype=torch.float64, device=y.device).expand(m, k).reshape(grouped.shape)
    if a.scale is None:
        absmax = grouped.abs().amax(-1)
        want = torch.where(absmax == 0, 1.0, absmax / high)
        slack = bounds.amax(-1) / high + gamma(1) * want
        assert_within(out.scale, want, torch.where(absmax == 0, 0.0, slack), "scale")
    scale = out.scale.double().reshape(-1, a.groups, 1)
    exact = (grouped / scale).reshape(m, k)
    tolerance = (bounds / scale).reshape(m, k) + gamma(3) * exact.abs()
    codes = out.q.reshape(m, k)
    if a.lut is not None:
        back = torch.empty_like(a.lut)
        back[a.lut.long() + 128] = torch.arange(-128, 128, device=y.device).to(torch.int8)
        codes = back[codes.long() + 128]
    assert_codes_match(codes, exact, tolerance, low, high, a.zero_point)
