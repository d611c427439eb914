"""Bootstrap confidence intervals."""

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 500  # resamples at a time, which bounds the memory


def ratio_of_perplexities(
    first: Tensor, second: Tensor, tokens: Tensor, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of perplexity(first) / perplexity(second), paired, resampling whole contexts.

    Windows of one context are not independent, so contexts are what is drawn.

    Args:
        first: (n,) summed negative log-likelihood of each context, in nats.
        second: (n,) the same contexts scored in another way.
        tokens: (n,) number of scored tokens of each context.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(tokens), (resamples, len(tokens)), generator=random)
    difference = (first - second).double().cpu()[rows].sum(1) / tokens.double().cpu()[rows].sum(1)
    low, high = torch.quantile(difference, torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return low, high


def interval(
    sums: Tensor, statistic: Callable[[Tensor], Tensor], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of a statistic that depends on sums over contexts, resampling whole contexts.

    Args:
        sums: (n, k) what each context adds to the k sums (its score and its number of questions, for instance).
        statistic: turns sums (resamples, k) float64 into its values (resamples,).
        resamples: bootstrap samples.
        seed: of the resampling.
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
