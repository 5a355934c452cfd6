"""Pure maths over tensors: no models, no files, no state but the KL controller's; nothing is imported but torch.

masking            sums, means, variances and whitening over a mask; how a token loss is averaged
logprobs           log-probs of tokens and entropies, from logits or chunk by chunk from hidden states
returns            the time axis: returns, n-step and generalised advantages, V-trace
advantages         the group axis: comparing the samples of one prompt
shaping            from a sequence's score to its tokens' rewards; length penalty
kl                 estimators of the KL divergence and the controller of its weight
policy_losses      REINFORCE, PPO, GSPO, CISPO, SAPO, importance weights
supervised_losses  likelihood, values, reward models, preferences, minimum risk, distillation
distillation       the divergence of two networks' distributions, chunk by chunk from hidden states
metrics            approximate KL, clip fraction, explained variance

Notation and numeric conventions: docs/notation.md.
"""

from . import (
    advantages,
    distillation,
    kl,
    logprobs,
    masking,
    metrics,
    policy_losses,
    returns,
    shaping,
    supervised_losses,
)

__all__ = [
    "advantages",
    "distillation",
    "kl",
    "logprobs",
    "masking",
    "metrics",
    "policy_losses",
    "returns",
    "shaping",
    "supervised_losses",
]
