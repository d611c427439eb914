"""Bootstrap confidence intervals."""

from collections.abc import Callable

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
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(tokens), (resamples, len(tokens)), generator=random)
    difference = (first - second).double().cpu()[rows].sum(1) / tokens.double().cpu()[rows].sum(1)
    low, high = torch.quantile(difference, torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return low, high


def interval(
    sums: Tensor, statistic: Callable[[Tensor], Tensor], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of a statistic that depends on sums over contexts, by resampling whole contexts.

    Args:
        sums: (n, k) the contribution of each context to the k sums (for instance its score and number of questions).
        statistic: maps sums (resamples, k) in float64 to its values (resamples,).
        resamples: number of bootstrap samples.
        seed: seed of the resampling.
    """
    random = torch.Generator().manual_seed(seed)
    contexts, wide = len(sums), sums.double().cpu()
    values = []
    for start in range(0, resamples, _BLOCK):
        rows = torch.randint(contexts, (min(_BLOCK, resamples - start), contexts), generator=random)
        drawn = torch.zeros(rows.shape, dtype=torch.float64).scatter_add_(1, rows, torch.ones_like(rows).double())
        values.append(statistic(drawn @ wide))
    low, high = torch.quantile(torch.cat(values), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
