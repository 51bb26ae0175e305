"""Two oracles of integer attention, both written from the documented formulas and sharing nothing with ``ref``.

``naive`` is float64 Python loops. ``exact`` is the same in tensors, and bounds what a back end that computes in floats
of unit roundoff ``unit`` may return. Only three things can differ from the exact result:

* a code of P whose value before rounding lies within its own error of a tie moves by one level;
* a code of V' likewise (per-token scales only);
* the few float operations after the integer product.

The error of a score is 12 roundings of the magnitudes that were added up (products with the scales, 1/power and log2 e
included), that of exp adds 4, that of a sum of N terms in at least 4 partial sums N/4 + 8.
"""

from __future__ import annotations

import math

import torch

U32 = 2.0**-24


def _scale_of(scale, b, h, i):
    if scale.dim() == 3:
        return float(scale[b, h, i])
    return float(scale.flatten()[h if scale.numel() > 1 else 0])


def naive(q, k, v, q_scale, k_scale, v_scale, focus, softmax_scale, bias=None, mask=None):
    """[B, Nq, H·d] float64 by scalar loops over finite data."""
    (nb, nh, nq, d), nk = q.shape, k.shape[2]
    levels, step, offset = focus.decode()
    levels = levels.tolist()
    q_codes, k_codes, v_codes = q.tolist(), k.tolist(), v.tolist()
    out = torch.zeros(nb, nq, nh, d, dtype=torch.float64)
    for b in range(nb):
        for h in range(nh):
            vs = [_scale_of(v_scale, b, h, j) for j in range(nk)]
            top_v = max(vs, default=1.0)
            aligned = [[round(c * (vs[j] / top_v)) for c in v_codes[b][h][j]] for j in range(nk)]
            for i in range(nq):
                scores = {}
                for j in range(nk):
                    dot = sum(x * y for x, y in zip(q_codes[b][h][i], k_codes[b][h][j]))
                    s = dot * (_scale_of(q_scale, b, h, i) * softmax_scale) * _scale_of(k_scale, b, h, j)
                    s += 0.0 if bias is None else float(bias[h, i, j])
                    if mask is not None:
                        s += float(mask[b % mask.shape[0], i if mask.shape[1] > 1 else 0, j])
                    if s != -math.inf:
                        scores[j] = s
                if not scores:
                    continue
                top = max(scores.values())
                e = {j: math.exp(s - top) for j, s in scores.items()}
                total = sum(e.values())
                level = {}
                for j, x in e.items():
                    u = x if focus.anchor == "row" else x / total
                    u = min(max((u - focus.b1) * (1.0 / (focus.b2 - focus.b1)), 0.0), 1.0)
                    level[j] = levels[round(u ** (1.0 / focus.power) * focus.n)]
                row_sum = sum(x * step + offset for x in level.values())
                denom = row_sum if focus.renormalize else (total if focus.anchor == "row" else 1.0)
                for c in range(d):
                    num = sum((x * step + offset) * aligned[j][c] for j, x in level.items())
                    out[b, i, h, c] = top_v * num / denom if denom else 0.0
    return out.reshape(nb, nq, nh * d)


def _spread(scale, b, h, n):
    scale = scale.double()
    return scale if scale.dim() == 3 else scale.reshape(1, -1, 1).expand(b, h, n)


def exact(q, k, v, q_scale, k_scale, v_scale, focus, softmax_scale, bias=None, mask=None, unit=U32):
    """(o, tolerance), both [B, Nq, H·d] float64, over finite scales."""
    (b, h, nq, d), nk = q.shape, k.shape[2]
    if nk == 0:
        zero = torch.zeros(b, nq, h * d, dtype=torch.float64)
        return zero, zero
    levels, step, offset = focus.decode()
    levels = levels.double().to(q.device)
    qs, ks, vs = (_spread(s, b, h, n) for s, n in ((q_scale, nq), (k_scale, nk), (v_scale, nk)))
    s = (q.double() @ k.double().mT) * (qs * softmax_scale).unsqueeze(-1) * ks.unsqueeze(-2)
    magnitude = s.abs()
    added = [] if bias is None else [bias.double()]
    if mask is not None:
        added.append(mask.double()[torch.arange(b) % mask.shape[0]].unsqueeze(1))
    for x in added:
        s, magnitude = s + x, magnitude + x.abs()
    valid = s != -math.inf
    magnitude = torch.where(valid, magnitude, 0.0)
    top = s.amax(-1, keepdim=True)
    e = torch.exp(s - torch.where(top == -math.inf, 0.0, top))
    total = e.sum(-1, keepdim=True)
    rel_e = unit * (12 * (magnitude + magnitude.amax(-1, keepdim=True)) + 4)
    rel_total = rel_e.amax(-1, keepdim=True) + (nk / 4 + 8) * unit
    row = focus.anchor == "row"
    u, rel_u = (e, rel_e) if row else (e / total, rel_e + rel_total + 2 * unit)
    span = focus.b2 - focus.b1
    x = (u - focus.b1) / span
    dx = (u * (rel_u + 2 * unit) + 4 * unit * focus.b1) / span + 4 * unit * x.abs()

    def code(x, sign=0.0):
        x = x.clamp(0, 1)
        slack = sign * unit * (8 + 2 * x.clamp(min=1e-38).log().abs() / focus.power)
        return torch.round(focus.n * x ** (1 / focus.power) * (1 + slack)).clamp(0, focus.n).long().where(valid, 0)

    level = levels[code(x)] * valid
    # The true level of a back end lies between those of the two ends; levels increase with the code.
    d_level = (levels[code(x + dx, 1.0)] - levels[code(x - dx, -1.0)]) * valid
    v_top = vs.amax(-1, keepdim=True)
    aligned = torch.nan_to_num(v.double() * (vs / v_top).unsqueeze(-1))
    value = torch.round(aligned)
    per_token = (v.double() != aligned).any()
    near = unit * 3 * aligned.abs() * per_token
    d_value = torch.round(aligned + near) - torch.round(aligned - near)

    products = (level @ value) * step, (valid.double() @ value) * offset
    num = products[0] + products[1]
    d_num = step * (d_level @ (value.abs() + d_value) + level @ d_value) + offset * (valid.double() @ d_value)
    d_num = d_num + 6 * unit * (products[0].abs() + products[1].abs())
    if focus.renormalize:
        denom = level.sum(-1, keepdim=True) * step + valid.double().sum(-1, keepdim=True) * offset
        d_denom = step * d_level.sum(-1, keepdim=True) + 6 * unit * denom
    else:
        denom = total if row else torch.ones_like(total)
        d_denom = rel_total * denom if row else torch.zeros_like(denom)
    least = denom - d_denom
    o = torch.where(denom == 0, 0.0, num / denom)
    tol = (d_num + o.abs() * d_denom) / least + 8 * unit * o.abs()
    tol = torch.where(least > 0, tol, torch.where(d_denom == 0, 0.0, torch.inf))
    some = valid.any(-1, keepdim=True)
    o, tol = (torch.where(some, x * v_top.unsqueeze(-1), 0.0) for x in (o, tol))
    return tuple(x.transpose(1, 2).reshape(b, nq, h * d) for x in (o, tol))


def assert_attention(got, *args, unit=U32, out_unit=0.0, vacuous=0.05, **kw):
    """``got`` is within the derived bound of the exact result, and the bound says something.

    ``out_unit`` is the unit roundoff of a narrower output dtype. ``vacuous`` is the largest share of elements whose
    bound may exceed a tenth of the largest output (ties are rare).
    """
    o, tol = exact(*args, unit=unit, **kw)
    tol = tol + out_unit * (o.abs() + tol)
    assert got.shape == o.shape
    wrong = ~((got.double() - o).abs() <= tol)
    if wrong.any():
        at = tuple(torch.nonzero(wrong)[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} wrong; first at {at}: got {float(got[at])}, "
            f"expected {float(o[at])} ± {float(tol[at])}"
        )
    if o.numel():
        loose = tol > 0.1 * o.abs().max() + 1e-30
        assert loose.double().mean() <= vacuous, "the bound is vacuous on this data"
