"""What dpo and reward share: rows of answers as units, one update per step, held-out accuracy, checkpoints.

The losses themselves are in the recipes' own files.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from upslope.build import Policy
from upslope.data.examples import Encoded
from upslope.data.records import read_records
from upslope.evaluation.measurement import wilson
from upslope.evaluation.preferences import share
from upslope.loop.kept import DataAccount, Kept, shared_out, tell_plain, too_long
from upslope.loop.learner import PolicyLearner
from upslope.options.finetune import PreferenceData
from upslope.runs.progress import told
from upslope.training.optim import Group
from upslope.training.step import Forward, Loss, Unit, measure, unit_batches, weighted_mean
from upslope.training.stopping import Evaluation, StepResult

Row = TypeVar("Row")


def read_rows(
    options: PreferenceData, tokenizer: Any, encode: Callable[..., Encoded[Row]]
) -> tuple[list[Row], list[Row], DataAccount]:
    """Training and held-out rows, and what became of every row.

    Without eval_data the last tenth is held out, whatever eval_samples is (unless 0: then every row is trained on), so
    that a resumed run may look at more or fewer rows and still trains on the same ones.
    """
    assert options.data is not None
    encode = partial(encode, tokenizer=tokenizer, max_length=options.max_length)
    data = _kept(options, options.data, encode)
    if not options.eval_samples:
        return shared_out(data, None, held=0, samples=0)
    held_out = _kept(options, options.eval_data, encode) if options.eval_data is not None else None
    return shared_out(data, held_out, held=len(data.rows) // 10, samples=options.eval_samples)


def _kept(options: PreferenceData, source: str, encode: partial[Encoded[Row]]) -> Kept[Row]:
    with told(f"reading and encoding {source}"):
        found = encode(records := read_records(source, columns=options.columns))
    tell_plain(records, encode.keywords["tokenizer"], source)
    return Kept(source, found.rows, *too_long(found.too_long, options.max_length))


class PreferenceLearner(PolicyLearner):
    """One update per step over `batch_size` units; a recipe gives the units and the loss."""

    higher_is_better = True
    forward = Forward()

    def __init__(
        self,
        options: PreferenceData,
        policy: Policy,
        units: list[Unit],
        held_out: list[Unit],
        account: DataAccount,
        *,
        extra: Sequence[Group] = (),
    ) -> None:
        super().__init__(options, policy, len(units), extra=extra)
        self.units, self.held_out, self.account = units, held_out, account

    def loss_of(self, units: Sequence[Unit], indices: Sequence[int] | None) -> tuple[Loss, dict[str, float]]:
        """The loss of these units, and numbers to log with it; `indices` into the training units, None: held out."""
        raise NotImplementedError(f"{type(self).__name__} gives no loss")

    def step(self, step: int) -> StepResult:
        """One batch of units, one update."""
        o, started = self.options, time.perf_counter()
        indices = self.order.take(o.batch_size)
        units = [self.units[i] for i in indices]
        loss, numbers = self.loss_of(units, indices)
        batches = unit_batches(units, o.micro_batch_tokens, device=self.policy.model.device)
        metrics = self.update(step, batches, loss, self.forward)
        seconds = time.perf_counter() - started
        trained = sum(sum(e.mask) for unit in units for e in unit.examples)
        rate = sum(unit.tokens for unit in units) / seconds
        return StepResult({**metrics, **numbers, "num_tokens": trained, "tokens_per_second": rate}, trained)

    def measured(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Loss and metrics of every held-out unit, and their means."""
        o, model = self.options, self.policy.model
        loss, numbers = self.loss_of(self.held_out, None)
        batches = unit_batches(self.held_out, o.micro_batch_tokens, device=model.device)
        found = measure(model, batches, loss, self.forward)
        return found, weighted_mean(found, self.held_out) | numbers

    def evaluate(self, step: int) -> Evaluation | None:
        """Held-out loss, and the share of judgements that are right with its 95% interval, as `upslope eval`."""
        if not self.held_out:
            return None
        found, means = self.measured()
        n = sum(unit.terms for unit in self.held_out)
        right = found["rewards/accuracies"].tolist()
        value, low, high = share(right, self.options.seed) if n == len(right) else wilson(round(sum(right)), n)
        metrics: dict[str, Any] = {"eval_loss": means.pop("loss")}
        metrics["accuracy"] = {"value": value, "low": low, "high": high, "n": n, "errors": 0}
        means.pop("rewards/accuracies")
        return Evaluation("accuracy", metrics | means | self.calibration(found), loss=metrics["eval_loss"])

    def calibration(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Further held-out numbers of the recipe."""
        return {}

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer and the training rows, for the fingerprint."""
        rows = ([(e.tokens, e.mask, e.fields.get("label")) for e in unit.examples] for unit in self.units)
        return self.policy.tokenizer, zip(rows, (unit.values for unit in self.units), strict=True)


def right_of(margins_U: Tensor) -> Tensor:
    """1 where a judgement is right by its margin, 0 where it is wrong, and half at a tie. [U] -> [U]."""
    return (1 + margins_U.detach().sign()) / 2
