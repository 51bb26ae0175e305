"""Triton back end of the float stages: the device functions of the fused kernels, one at a time.

The two branch products are the same dots in the same dtype; sums over a row and over ranks may be taken in another
order than in a fused kernel, whose tiles differ. Codes beside a tie then differ, and nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton import host
from ...triton.device import activate, dot_operand, float_dot, load_float
from ...triton.host import ceil_div, power_of_2
from ..qattention.triton import focus_position
from ..quantize.triton import MAX_RANK, normalized

__all__ = ["expand", "focus_position", "gelu", "layer_norm", "project"]

BLOCK = 1024


@triton.jit
def _gelu(x, y, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, activate(load_float(x + at, at < count), ACTIVATION), mask=at < count)


@triton.jit
def _layer_norm(
    x,  # [M, K] float32
    gamma,  # [K] or None
    beta,  # [K] or None
    y,  # [M, K] float32
    M,
    K,
    count,  # K as a float
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_K)
    mask = (row < M)[:, None] & (col < K)[None, :]
    at = row[:, None].to(tl.int64) * K + col[None, :]
    v = normalized(load_float(x + at, mask), gamma, beta, col, col < K, mask, count, eps)
    tl.store(y + at, v, mask=mask)


@triton.jit
def _project(
    x,  # [M, K] float32
    basis,  # [R, K]
    t,  # [M, R] float32
    M,
    K,
    R,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, RANK)
    dtype: tl.constexpr = basis.dtype.element_ty
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for k in range(0, K, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        a = load_float(x + row[:, None].to(tl.int64) * K + col[None, :], (row < M)[:, None] & (col < K)[None, :])
        d = tl.load(basis + rank[:, None] * K + col[None, :], mask=(rank < R)[:, None] & (col < K)[None, :], other=0.0)
        acc = float_dot(dot_operand(a, dtype), tl.trans(dot_operand(d, dtype)), acc)
    tl.store(t + row[:, None].to(tl.int64) * R + rank[None, :], acc, mask=(row < M)[:, None] & (rank < R)[None, :])


@triton.jit
def _expand(
    t,  # [M, R] float32
    basis,  # [R, N], any strides
    rank_stride,
    col_stride,
    y,  # [M, N] float32
    M,
    N,
    R,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = basis.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, RANK):
        rank = r + tl.arange(0, RANK)
        a = load_float(t + row[:, None].to(tl.int64) * R + rank[None, :], (row < M)[:, None] & (rank < R)[None, :])
        b_mask = (rank < R)[:, None] & (col < N)[None, :]
        b = tl.load(basis + rank[:, None] * rank_stride + col[None, :] * col_stride, mask=b_mask, other=0.0)
        acc = float_dot(dot_operand(a, dtype), dot_operand(b, dtype), acc)
    tl.store(y + row[:, None].to(tl.int64) * N + col[None, :], acc, mask=(row < M)[:, None] & (col < N)[None, :])


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if y.numel():
        k = x.shape[-1]
        block_k = power_of_2(k, 16)
        block_m = power_of_2(4096 // block_k, 1, 16)
        arguments = (x, host.dense(weight), host.dense(bias), y, x.numel() // k, k, float(k), eps, block_m, block_k)
        warps = min(max(block_k // 2048, 4), 16)
        host.launch(_layer_norm, (ceil_div(x.numel() // k, block_m),), arguments, x.device, num_warps=warps)
    return y


def gelu(x: Tensor, tanh: bool) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        host.launch(_gelu, (ceil_div(x.numel(), BLOCK),), (x, y, x.numel(), 2 if tanh else 1, BLOCK), x.device)
    return y


def project(x: Tensor, basis: Tensor) -> Tensor:
    x, basis = x.contiguous(), basis.contiguous()
    (m, k), rank = x.shape, basis.shape[0]
    if rank > MAX_RANK:
        raise ValueError(f"basis has rank {rank}, the triton back end serves at most {MAX_RANK}")
    t = torch.empty(m, rank, dtype=torch.float32, device=x.device)
    if t.numel():
        padded = power_of_2(rank, 16)
        arguments = (x, basis, t, m, k, rank, padded, 16, min(128, 8192 // padded))
        host.launch(_project, (ceil_div(m, 16),), arguments, x.device)
    return t


def expand(t: Tensor, basis: Tensor) -> Tensor:
    t = t.contiguous()
    (m, rank), n = t.shape, basis.shape[1]
    y = torch.empty(m, n, dtype=torch.float32, device=t.device)
    if y.numel():
        grid = (ceil_div(m, 32), ceil_div(n, 64))
        arguments = (t, basis, *basis.stride(), y, m, n, rank, power_of_2(rank, 16, 64), 32, 64)
        host.launch(_expand, grid, arguments, t.device)
    return y
