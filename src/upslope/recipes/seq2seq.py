"""An encoder-decoder on pairs of texts: maximum likelihood here, minimum risk in minimum_risk.py.

for each batch of pairs (source x, target y with its end mark):
    logp_t = log pi(y_t | y before t, x)                at the target's tokens
    loss   = -sum_t logp_t / N                          N target tokens in the whole batch
             label_smoothing e: -(1 - e) logp_t - e mean_v log pi(v | ...)     (1512.00567, section 7; 1706.03762)
    AdamW step on the float32 masters

The network is Vaswani et al. 2017 (1706.03762), the objective Sutskever et al. 2014 (1409.3215, equation 1).
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from upslope.build import Policy
from upslope.loop.pairs import PairData, PairLearner, start_policy
from upslope.loop.session import Recipe
from upslope.options.supervised import Seq2SeqOptions
from upslope.recipes.minimum_risk import MinimumRisk
from upslope.training.stopping import StepResult


@contextmanager
def make_learner(options: Seq2SeqOptions, policy: Policy | None = None) -> Iterator[PairLearner]:
    """What a run trains; a `policy` already loaded is trained in place."""
    with tempfile.TemporaryDirectory(prefix="upslope-seq2seq-") as folder:
        data = PairData.of(options)
        policy = policy or start_policy(options, data, Path(folder))
        kind = MinimumRisk if options.objective == "minimum_risk" else MaximumLikelihood
        with closing(kind(options, policy, data)) as learner:
            yield learner


class MaximumLikelihood(PairLearner):
    """Likelihood of the references, with dropout and label smoothing."""

    def step(self, step: int) -> StepResult:
        """One batch of pairs, one update."""
        examples = [self.examples[i] for i in self.order.take(self.options.batch_size)]
        result = self.imitate(step, examples, feed_last=True)
        self.weights_moved()
        return result


seq2seq = Recipe("seq2seq", make_learner)
