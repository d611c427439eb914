"""Bootstrap confidence intervals."""

import torch
from torch import Tensor


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
