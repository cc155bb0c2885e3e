"""The training loop: steps, evaluation, checkpoints. Everything it needs is handed to it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from llmfast.data import Batch, Dataset, Mixture, Rows
from llmfast.losses import linear_cross_entropy, mtp_cross_entropy, mtp_valid_counts
from llmfast.models import Decoder
from llmfast.optim import FusedOptimizer
from llmfast.train.checkpoint import save_checkpoint
from llmfast.train.config import Config
from llmfast.train.metrics import MetricsFile, ProgressDisplay, say, weighted_mean
from llmfast.train.schedule import head_weights_at, lr_at


class Trainer:
    """Trains `model` on `data` for `config.train.steps` steps.

    The loss of a step is the sum over its tokens divided by the number of valid ones in all its micro-batches, and
    that is also what is logged. Nothing in a step makes the host wait for the device: losses and the count of skipped
    steps stay there until a line is logged.

    A model that predicts further tokens minimises the weighted sum of its heads' losses, logged as `objective`; `loss`
    is that of the next token all the same, in training as in validation.
    """

    def __init__(
        self,
        config: Config,
        model: Decoder,
        optimizer: FusedOptimizer,
        data: Dataset,
        mixture: Mixture,
        *,
        run: Path,
        device: torch.device,
        dtype: torch.dtype,
        console: Console,
        metrics: MetricsFile,
        step: int = 0,
        tokens: int = 0,
        sequences: int = 0,
    ) -> None:
        self.config, self.model, self.optimizer, self.data, self.mixture = config, model, optimizer, data, mixture
        self.run, self.device, self.dtype, self.console, self.metrics = run, device, dtype, console, metrics
        self.step = step  # steps done
        self.tokens = tokens  # valid labels seen
        self.sequences = sequences  # rows seen: the next one's number in the mixture
        self.skipped = torch.zeros((), device=device)  # steps whose gradient was not finite
        self.seconds = 0.0  # spent on steps, without evaluation
        self._stop = False
        K = model.config.targets if model.config.mtp != "none" else 0
        self._heads = torch.zeros(2, K, device=device)  # each head's loss and accuracy, summed since the last line
        self._objective = torch.zeros((), device=device)

    def fit(self) -> bool:
        """Run to the last step, or to the next after SIGINT or SIGTERM; False if stopped so. Ends on a checkpoint."""
        t = self.config.train
        if self.step == 0:
            self._evaluate()
        logged_step, logged_tokens, logged_time = self.step, self.tokens, time.perf_counter()
        losses = torch.zeros((), device=self.device)
        saved = -1
        with self._stop_signals(), ProgressDisplay(self.console, t.steps, self.step) as display:
            while self.step < t.steps and not self._stop:
                lr, loss, norm = self._train_step()
                losses += loss
                display.advance(self.step)
                if self.step % t.log_every == 0 or self.step == t.steps:
                    mean = (losses / (self.step - logged_step)).item()  # the one wait for the device
                    now = time.perf_counter()
                    self.seconds += now - logged_time
                    speed = (self.tokens - logged_tokens) / (now - logged_time)
                    self._log(mean, lr, norm, speed, self.step - logged_step)
                    display.show(self.step, mean, lr, speed)
                    losses.zero_()
                    logged_step, logged_tokens, logged_time = self.step, self.tokens, now
                if self.step % t.eval_every == 0 or self.step == t.steps:
                    paused = time.perf_counter()
                    self._evaluate()
                    logged_time += time.perf_counter() - paused
                if self.step % t.save_every == 0:
                    self.save()
                    saved = self.step
        if saved != self.step:
            self.save()
        return not self._stop

    def evaluate(self) -> dict[str, tuple[float, int]]:
        """Loss and number of tokens of each source's held-out rows (the first `eval_rows`)."""
        t = self.config.train
        self.model.eval()
        result = {}
        for source, rows in self.data.validation.items():
            total, count = 0.0, 0
            for batch in evaluation_batches(rows, t.eval_rows, t.batch_size):
                with torch.no_grad():
                    total += self._loss(batch, batch.num_valid).item() * batch.num_valid
                count += batch.num_valid
            result[source] = (total / count, count)
        self.model.train()
        return result

    def save(self) -> Path:
        return save_checkpoint(
            self.run, self.step, self.model, self.optimizer,
            tokens=self.tokens, sequences=self.sequences, mixture=self.mixture.state(),
        )  # fmt: skip

    def _train_step(self) -> tuple[float, Tensor, Tensor]:
        """One optimizer step; the learning rate, and on the device the loss and the gradient's norm."""
        o, t = self.config.optimizer, self.config.train
        lr = lr_at(
            self.step, lr=o.lr, steps=t.steps, warmup_steps=o.warmup_steps, schedule=o.schedule, final_lr=o.final_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batches = [self._next_batch() for _ in range(t.accumulate)]
        num_valid = sum(batch.num_valid for batch in batches)
        if self.model.config.mtp == "none":
            loss = torch.zeros((), device=self.device)
            for batch in batches:
                part = self._loss(batch, num_valid)
                part.backward()
                loss += part.detach()
        else:
            loss = self._backward_heads(batches)
        # Clips to its max_grad_norm, and leaves everything as it is where the norm is not finite.
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        norm = self.optimizer.grad_norm
        if norm is None:
            raise ValueError(
                "the trainer's optimizer needs max_grad_norm (math.inf: only measure), which skips bad steps"
            )
        self.skipped += ~norm.isfinite()
        self.step += 1
        self.tokens += num_valid
        return lr, loss, norm

    def _next_batch(self) -> Batch:
        first, self.sequences = self.sequences, self.sequences + self.config.train.batch_size
        return self.data.batch(*self.mixture.sequences(first, self.sequences), first)

    def _loss(self, batch: Batch, num_valid: int) -> Tensor:
        """Of the next token."""
        tokens, labels, positions, documents = self._inputs(batch)
        with self._autocast():
            hidden = self.model(tokens, positions=positions, document_ids=documents)
            return linear_cross_entropy(hidden, self.model.unembedding, labels, num_valid=num_valid)

    def _backward_heads(self, batches: list[Batch]) -> Tensor:
        """Backward of all heads' losses over a step's micro-batches; the next token's loss, on the device."""
        c = self.model.config
        K = c.targets
        counts = torch.stack([mtp_valid_counts(b.labels, K, b.document_ids) for b in batches]).sum(0)
        num_valid = self._on_device(counts.clamp(min=1))
        weights = self._on_device(torch.tensor(head_weights_at(self.step, K, self.config)))
        detached = c.mtp == "sequential" and c.mtp_detach
        alone = K == 1 and c.mtp != "shared"  # then this is the loss of the next token, to the last bit
        heads = torch.zeros_like(self._heads)
        for batch in batches:
            tokens, labels, positions, documents = self._inputs(batch)
            with self._autocast():
                loss, stats = mtp_cross_entropy(
                    self.model(tokens, positions=positions, document_ids=documents, all_heads=True),
                    self.model.unembedding,
                    labels,
                    document_ids=documents,
                    head_weights=None if alone else weights,
                    num_valid=num_valid,
                    detach_unembedding=[detached and k > 0 for k in range(K)],
                    return_stats=True,
                )
            loss.backward()
            self._objective += loss.detach()
            hits = torch.where(stats.num_valid > 0, stats.accuracy * stats.num_valid, 0.0)
            heads += torch.stack([stats.head_loss, hits / num_valid])
        self._heads += heads
        return heads[0, 0]

    def _inputs(self, batch: Batch) -> list[Tensor]:
        return [self._on_device(x) for x in (batch.tokens, batch.labels, batch.positions, batch.document_ids)]

    def _on_device(self, x: Tensor) -> Tensor:
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _evaluate(self) -> None:
        results = self.evaluate()
        losses = {source: loss for source, (loss, _) in results.items()}
        self.metrics.write(
            step=self.step, tokens=self.tokens, validation=losses, validation_mean=weighted_mean(results)
        )
        parts = ", ".join(f"{source} {loss:.3f}" for source, loss in losses.items())
        say(self.console, f"step {self.step}: validation loss {parts}")

    def _log(self, loss: float, lr: float, norm: Tensor, speed: float, steps: int) -> None:
        values: dict[str, Any] = {"loss": loss, "lr": lr, "grad_norm": norm.item(), "tokens_per_s": speed}
        if self.model.config.mtp != "none":
            values["objective"] = (self._objective / steps).item()
            values["head_loss"], values["head_accuracy"] = (self._heads / steps).tolist()
            values["head_weights"] = head_weights_at(self.step - 1, self.model.config.targets, self.config)
            self._objective.zero_()
            self._heads.zero_()
        skipped = int(self.skipped.item())
        if skipped:
            values["skipped"] = skipped
            say(self.console, f"{skipped} steps so far had a gradient that is not finite and were skipped")
        self.metrics.write(step=self.step, tokens=self.tokens, **values)

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step they come in; a second one is not caught."""

        def stop(number: int, frame: Any) -> None:
            self._stop = True
            signal.signal(number, signal.default_int_handler)

        try:
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where nobody sends signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def evaluation_batches(rows: Rows, most: int, batch_size: int) -> Iterator[Batch]:
    count = min(most, len(rows))
    for start in range(0, count, batch_size):
        yield rows.batch(list(range(start, min(start + batch_size, count))))
