"""Error-aware routing of SVG-EAR (arXiv:2603.08982): compute the clusters that their means would answer worst.

Where skipped clusters answer by their means, a query cluster i and a key cluster j of m_j keys lose, for n_i queries at
their centroid q_i,

    E_ij = n_i sum_{k in j} (exp(q_i . k_j / sqrt(D)) - exp(q_i . k / sqrt(D)))^2,

k_j the mean of the keys. The pairs with the most error for their size, E_ij / (n_i m_j), are computed until a row has
spent its budget of keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.kernels.groups import WORKING_BYTES
from falloff.kernels.product import product

KEY_BYTES = 8
"""Of one query cluster and key: its weight, in place of its logit, and what sums need on the way."""


def error_per_pair(q_HCD: Tensor, keys_HND: Tensor, sizes_HC: Tensor) -> Tensor:
    """E_ij / (n_i m_j) of the module's docstring, relative within a row: [H, Cq, Ck]; 0 for clusters without keys.

    ``q_HCD``: centroids of queries. ``keys_HND``: keys, cluster by cluster, ``sizes_HC`` of them in each.
    """
    heads, length, head_dim = keys_HND.shape
    lengths = sizes_HC.flatten()
    means = segment_means(keys_HND.to(q_HCD.dtype).flatten(0, 1), lengths).view(heads, -1, head_dim)
    together = max(1, WORKING_BYTES // (KEY_BYTES * heads * length))
    errors = []
    for centers in q_HCD.split(together, 1):  # type: ignore[no-untyped-call]  # torch's own, without a type
        centers = centers * head_dim**-0.5
        at_keys = product(keys_HND, centers.to(keys_HND.dtype).mT)
        top = at_keys.amax(1, keepdim=True)  # the same for a whole row, so that it cancels in a comparison
        at_keys = at_keys.sub_(top).exp_()
        at_mean = (means @ centers.mT - top).exp()
        first = segment_means(at_keys.flatten(0, 1), lengths).view(at_mean.shape)
        second = segment_means(at_keys.square_().flatten(0, 1), lengths).view(at_mean.shape)
        error = (at_mean.square() - 2 * at_mean * first + second).clamp(min=0)
        errors.append(error.masked_fill((sizes_HC == 0)[..., None], 0).mT)
    return torch.cat(errors, 1)


def spend(worth: Tensor, sizes: Tensor, budget: Tensor) -> Tensor:
    """The worthiest blocks of every row [..., K] until the next would exceed ``budget`` [..., 1]; one at least.

    ``sizes`` [..., K] is what each costs; blocks of size 0 are left out.
    """
    real = sizes > 0
    order = worth.masked_fill(~real, -1).sort(dim=-1, descending=True, stable=True).indices
    spent = sizes.gather(-1, order).cumsum(-1)
    within = spent <= budget
    within[..., 0] = True
    return torch.zeros_like(within).scatter_(-1, order, within) & real


def segment_means(x_ND: Tensor, lengths: Tensor) -> Tensor:
    """Means over consecutive rows, as many as ``lengths`` [T] says: [T, D]; 0 where there are none."""
    return _segment_sums(x_ND, lengths) / lengths.clamp(min=1)[:, None]


def _segment_sums(x_ND: Tensor, lengths: Tensor) -> Tensor:
    if x_ND.device.type == "cpu":  # where the operator for segments takes ten times as long as this one
        return F.embedding_bag(torch.arange(len(x_ND)), x_ND, lengths.cumsum(0) - lengths, mode="sum")
    sums: Tensor = torch.segment_reduce(x_ND, "sum", lengths=lengths, unsafe=True)  # sizes of clusters add up
    return sums
