"""Bootstrap confidence intervals."""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

_BLOCK = 500  # resamples computed at a time, to bound the memory


def ratio_of_perplexities(
    first: Tensor, second: Tensor, tokens: Tensor, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of perplexity(first) / perplexity(second), paired, by resampling whole contexts.

    Windows of one context are not independent, so the bootstrap draws contexts.

    Args:
        first: (n,) summed negative log-likelihood of each context, in nats.
        second: (n,) the same for the other way of scoring those contexts.
        tokens: (n,) number of scored tokens of each context.
        resamples: number of bootstrap samples.
        seed: seed of the resampling.
    """
    sums = torch.stack([first.double() - second.double(), tokens.double()], dim=1)
    logarithms = interval(sums, lambda total: total[:, 0] / total[:, 1], resamples, seed)
    low, high = torch.tensor(logarithms, dtype=torch.float64).exp().tolist()
    return low, high


def interval(
    sums: Tensor, statistic: Callable[[Tensor], Tensor], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of a statistic that depends on sums over clusters, by resampling whole clusters.

    It is the expanded percentile interval: a plain one is too narrow for few clusters, because the bootstrap divides by
    n where a variance is estimated with n - 1, and knows no t distribution; `tail` makes up for both.

    Args:
        sums: (n, k) the contribution of each cluster to the k sums (for instance the total score and the number of
            questions of a context).
        statistic: maps sums (resamples, k) in float64 to its values (resamples,).
        resamples: number of bootstrap samples.
        seed: seed of the resampling.
    """
    random = torch.Generator().manual_seed(seed)
    clusters, wide = len(sums), sums.double().cpu()
    values = []
    for start in range(0, resamples, _BLOCK):
        rows = torch.randint(clusters, (min(_BLOCK, resamples - start), clusters), dtype=torch.int32, generator=random)
        places = rows + torch.arange(len(rows), dtype=torch.int32)[:, None] * clusters
        drawn = torch.bincount(places.view(-1), minlength=places.numel()).view_as(rows)
        values.append(statistic(drawn.double() @ wide))
    level = tail(clusters)
    low, high = torch.quantile(torch.cat(values), torch.tensor([level, 1 - level], dtype=torch.float64)).tolist()
    return low, high


def tail(clusters: int) -> float:
    """The share of resamples to leave out on either side: 0.025 for many clusters, less for few (0 for one).

    The normal probability beyond sqrt(n / (n - 1)) t, where t leaves out 0.025 of the t distribution with n - 1 degrees
    of freedom (T. Hesterberg, What Teachers Should Know About the Bootstrap, 2015).
    """
    if clusters < 2:
        return 0.0
    freedom, z = clusters - 1, NormalDist().inv_cdf(0.975)
    # The series of t in powers of 1 / freedom (Abramowitz and Stegun 26.7.5): the error is below 1% from n = 4 on; for
    # fewer clusters the result is the whole range of the resamples either way.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return NormalDist().cdf(-math.sqrt(clusters / freedom) * t)
