"""Closed forms: low-rank branches, regressions and error-compensating rounding. float64, weights [N, K] as in layers.

C denotes a second moment E[x·xᵀ] [K, K] of the layer's input, D ``lora_down`` [R, K], U ``lora_up`` [N, R].
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitq_kernels.formats import QuantSpec

# Kernels take ranks in steps of one 16-wide tensor-core slice.
RANK_STEP = 16


def kernel_rank(rank: int, n: int, k: int) -> int:
    """The largest multiple of 16 that is at most ``rank`` and at most half of min(N, K) (0 if none)."""
    return min(rank, min(n, k) // 2) // RANK_STEP * RANK_STEP


def damped(c: Tensor, damping: float) -> Tensor:
    """C + damping·mean(diag C)·I; directions that calibration never saw must not cost nothing."""
    eye = torch.eye(c.shape[0], dtype=c.dtype, device=c.device)
    return c + (damping * c.diagonal().mean().clamp_min(1e-12)) * eye


def roots(c: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^−½ of a symmetric positive definite C."""
    values, vectors = torch.linalg.eigh(c)
    root = values.clamp_min(1e-12 * float(values[-1])).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def truncated(e: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U, D of the best rank-R approximation of e in the Frobenius norm, the singular values shared evenly."""
    u, s, v = torch.linalg.svd(e, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * v[:rank]


def whitened(e: Tensor, c: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U, D minimizing E‖(e − U·D)·x‖²: the truncated SVD of e·C^½, times C^−½.

    Args: e [N, K], c [K, K] positive definite (see :func:`damped`). Returns: U [N, R], D [R, K].
    """
    root, inverse = roots(c)
    up, down = truncated(e @ root, rank)
    return balanced(up, down @ inverse)


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """U·2^−s, 2^s·D: for every rank the power of two that brings both as near as can be, and so into float16."""
    ratio = up.abs().amax(0) / down.abs().amax(1).clamp_min(1e-300)
    half = (ratio.clamp(1e-60, 1e60).log2() / 2).round()
    return torch.ldexp(up, -half), torch.ldexp(down, half.unsqueeze(1))


def principal_directions(c: Tensor, rank: int) -> Tensor:
    """[R, K] orthonormal rows: the top eigenvectors of C, which leave the least E‖x − DᵀDx‖²."""
    return torch.linalg.eigh(c).eigenvectors[:, -rank:].flip(1).T.contiguous()


def regress(target: Tensor, cross: Tensor, c: Tensor, damping: float) -> Tensor:
    """W minimizing E‖y − W·x‖² + damping·mean(diag C)·‖W − target‖², given cross = E[y·xᵀ] (ridge towards target)."""
    return target + torch.linalg.solve(damped(c, damping), (cross - target @ c).T).T


@torch.no_grad()
def compensated_rounding(
    weight: Tensor, c: Tensor, scale: Tensor, spec: QuantSpec, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Round column by column, each time moving the columns still to come to make up for the error just made.

    Greedy minimization of E‖(W − W_q)·x‖² over codes (GPTQ, Frantar et al. 2023; the optimal brain surgeon's update),
    columns in order of falling diag C.

    Args: weight [N, K] float64, c [K, K], scale [N], spec: the weight's QuantSpec (a table too).
    Returns: codes [N, K] and latent weights [N, K] whose nearest rounding gives these codes.
    """
    order = c.diagonal().argsort(descending=True)
    w, c = weight[:, order].clone(), damped(c[order][:, order], damping)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(c)), upper=True)
    lut = None if spec.table is None else spec.table.lut().to(w)
    codes = torch.empty_like(w)
    for k in range(w.shape[1]):
        code = (w[:, k] / scale).round().clamp(spec.qmin, spec.qmax)
        if lut is not None:
            code = lut[code.long() + 128]
        codes[:, k] = code
        error = (w[:, k] - code * scale) / upper[k, k]
        w[:, k + 1 :] -= torch.outer(error, upper[k, k + 1 :])
    back = order.argsort()
    return codes[:, back], w[:, back]
