"""The training loop: steps, evaluation and checkpoints of whatever model, loss and data it is given."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from llmfast.optim import FusedOptimizer
from llmfast.train.batch import on_device
from llmfast.train.checkpoint import Checkpoints, settings_of
from llmfast.train.config import Config
from llmfast.train.durable import make_folder
from llmfast.train.metrics import MetricsFile, ProgressDisplay, outliving, peak_memory_bytes, say, weighted_mean
from llmfast.train.objective import Objective, Summed, Sums, WithLoss
from llmfast.train.parallel import World, clip_grad_norm_, micro_batch_size, prepare_blocks, spread, syncing
from llmfast.train.schedule import described, lr_of_step
from llmfast.train.settings import ConfigError
from llmfast.train.signals import handled
from llmfast.train.vocab_parallel import OfAllRanks, split_unembedding

SPIKE = 6.0  # standard deviations of the last lines' losses that a line's loss may be above their mean
_REMEMBERED = 30  # lines


class Data(Protocol):
    """Training sequences in a fixed order.

    What `batch` returns goes to the objective: tensors, or a dataclass, mapping or tuple of them.
    """

    def batch(self, first: int, count: int) -> Any:
        """Return sequences `first` to `first + count`."""
        ...


class Stream:
    """`Data` from any iterable of batches of equal size. A resumed run skips the batches it has seen."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self._next = iter(batches), 0

    def batch(self, first: int, count: int) -> Any:
        number, within = divmod(first, count)
        if within:
            raise ValueError(f"a stream has batches of {count} sequences: none begins at sequence {first}")
        if number < self._next:
            raise ValueError("a stream of batches cannot go back")
        batch = next(islice(self._batches, number - self._next, None), None)
        if batch is None:
            raise ValueError(f"data has fewer batches than train.steps needs: there is none with number {number}")
        self._next = number + 1
        return batch


class Hooks:
    """Functions that the trainer calls while it trains. Override the ones you need."""

    def before_step(self, trainer: "Trainer") -> None: ...

    def after_step(self, trainer: "Trainer") -> None: ...

    def on_log(self, trainer: "Trainer", values: dict[str, Any]) -> None:
        """Read the values of a log line before it is written; values may be added."""

    def on_evaluate(self, trainer: "Trainer", losses: dict[str, float]) -> None: ...

    def on_save(self, trainer: "Trainer") -> None: ...


class NonFinite(RuntimeError):
    """Error that ends a run in which too many steps had a gradient that is not finite."""


class Trainer:
    """A loop that trains `model` to the end of `config.train.steps`.

    The loss of a step is the sum over its tokens divided by the number of valid tokens, in all its micro-batches and on
    all ranks, and that is also what is logged. Nothing in a step makes the host wait for the device: losses and the
    count of skipped steps stay there until a line is logged.

    Args:
        model: any module that the objective can use, on the world's device.
        loss: an `Objective`, or a function of model and batch that returns the sum of its valid tokens' losses.
        optimizer: an optimizer of the model's parameters, or a function that makes one for the model. The function is
            needed where parameters are replaced, as by FSDP2.
        data: see `Data`; any other iterable of batches is read as a `Stream`.
        config: the section `train`, and the schedule and max_grad_norm of `optimizer`, are used. The schedule is a
            factor on the optimizer's own learning rates.
        run: folder for metrics.jsonl and checkpoints; None writes nothing.
        validation: by name, a function that returns the batches to evaluate, from the beginning each time.
        hooks: see `Hooks`.
        world: the ranks; by default this process alone, on the model's device.
        dtype: the dtype of autocast; float32 disables it.
        console: where progress is printed; by default the terminal, on the first rank.
        about: facts about the weights that checkpoints record, as JSON; `resume` shows them to `accept`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Objective | Callable[[nn.Module, Any], Tensor],
        optimizer: torch.optim.Optimizer | Callable[[nn.Module], torch.optim.Optimizer],
        data: Data | Iterable[Any],
        config: Config | None = None,
        *,
        run: Path | None = None,
        validation: Mapping[str, Callable[[], Iterable[Any]]] | None = None,
        hooks: Sequence[Hooks] = (),
        world: World | None = None,
        dtype: torch.dtype = torch.float32,
        console: Console | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config = config or Config()
        self.about = dict(about or {})
        t = config.train
        if t.epochs:
            raise ConfigError(f"train.epochs must be 0 here, where the length of the data is unknown; got {t.epochs}")
        self.world = world or World(next(model.parameters()).device)
        self.device, self.dtype, self.run, self.hooks = self.world.device, dtype, run, list(hooks)
        self.console = console or Console(quiet=not self.world.main)
        self.data: Data = data if hasattr(data, "batch") else Stream(data)  # type: ignore[assignment]
        self.validation = dict(validation or {})
        self.objective: Objective = loss if hasattr(loss, "num_valid") else Summed(loss)  # type: ignore[assignment]
        self.micro_batch_size = micro_batch_size(config, self.world)
        self._vocab_parallel = t.vocab_parallel and self.world.size > 1
        if (self._vocab_parallel or (self.world.size > 1 and t.parallel != "ddp")) and isinstance(
            optimizer, torch.optim.Optimizer
        ):
            what = "train.vocab_parallel" if t.parallel == "ddp" else f"train.parallel={t.parallel!r}"
            raise TypeError(
                f"with {what} optimizer must be a function that makes one for the model, whose parameters are "
                f"replaced; got {type(optimizer).__name__}"
            )
        prepare_blocks(model, config)
        self.model = model
        own = []
        if self._vocab_parallel:
            mesh = init_device_mesh(self.device.type, (self.world.size,))
            own = [f"model.{split_unembedding(model, mesh)}"]
            self.objective = OfAllRanks(self.objective, mesh)
        self.module = spread(WithLoss(model, self.objective), config, self.world, own)
        self.optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(model)
        fused = self.optimizer if isinstance(self.optimizer, FusedOptimizer) else None
        if fused is not None and not fused.steps_in_backward:
            for index in range(len(fused.param_groups)):
                if fused.option(index, "max_grad_norm") is None:
                    raise ValueError(
                        "the optimizer needs max_grad_norm in every group (math.inf: only measure), which skips bad "
                        f"steps; got None in group {index}"
                    )
        if fused is not None and fused.steps_in_backward:
            if isinstance(self.module, DistributedDataParallel):
                raise ConfigError("an optimizer that steps in backward needs train.parallel='fsdp': DDP reduces later")
            if t.batch_size > self.micro_batch_size * self.world.size:
                raise ConfigError("an optimizer that steps in backward needs all of a step's rows in one micro-batch")
        # The schedule gives config.optimizer.lr; each group has its own multiple of that.
        scheduled = config.optimizer.lr
        self._settings = settings_of(self.optimizer)  # before any step
        self._lr_shares = [float(g["lr"]) / scheduled if scheduled else 1.0 for g in self.optimizer.param_groups]
        self._lr_is_given = optimizer is self.optimizer or any(share != 1.0 for share in self._lr_shares)
        self.step = 0  # steps done
        self.sequences = 0  # read by all ranks so far, which is the number of the next one
        self.seconds = 0.0  # spent on steps, without evaluations and checkpoints
        self.tokens = 0  # valid labels of all ranks, up to the last line of the log
        self.skipped = 0  # steps whose gradient was not finite, up to the last line of the log
        self.sums: Sums = self._nothing()  # of the steps after the last line of the log
        self.logged_step = 0
        self.metrics: MetricsFile | None = None
        self.checkpoints: Checkpoints | None = None
        if run is not None:
            self.checkpoints = Checkpoints(
                run, self.world, keep_last=t.keep_last, keep_every=t.keep_every, tell=self.say
            )
        self._recent: list[float] = []
        self._stop = False
        # DDP and FSDP2 divide the sum of all ranks' gradients by their number.
        self._share = float(self.world.size)

    def resume(self, accept: Callable[[dict[str, Any]], None] = lambda meta: None) -> None:
        """Continue from the newest whole checkpoint of the run's folder.

        The trainer's settings are today's. So are those settings of the optimizer's groups that have changed since the
        last start. All other values in groups, which an optimizer may have counted, are the checkpoint's.

        Args:
            accept: called with the checkpoint's meta.json before anything changes: its "step", what the trainer was
                told "about" the weights, and more. It may raise.

        Raises:
            OSError: no checkpoint can be read, or it is of another model or optimizer.
        """
        if self.checkpoints is None:
            raise ValueError("resume needs a run folder")
        meta, tensors = self.checkpoints.load(self.module, self.optimizer, accept)
        self.step, self.sequences, self.tokens = meta["step"], meta["sequences"], meta["tokens"]
        self.skipped, self.logged_step, self._recent = meta["skipped"], meta["logged_step"], meta["recent"]
        if self.world.main:  # the saved sums are those of all ranks together
            self.sums = {name: t.to(self.device) for name, t in tensors.items()}
        if (take := getattr(self.data, "resume", None)) is not None:
            take(meta.get("data"), self.sequences)
        self.checkpoints.retire_newer()

    def fit(self) -> bool:
        """Train to the last step and save a checkpoint; False if SIGINT, SIGTERM or SIGHUP ended the run before that.

        One rank stops after the step in which the signal came, several after the next step that is logged: only then do
        they ask each other. If nothing more can be printed, training goes on in silence, with a word on stderr.

        Raises:
            NonFinite: more than `train.max_skipped` steps had to be skipped.
            OSError: a checkpoint or metrics.jsonl could not be written; the message names the last good checkpoint.
            FileExistsError: the run's folder holds checkpoints that this run has neither written nor resumed from.
        """
        with outliving(self.console):
            return self._fit()

    def _fit(self) -> bool:
        t = self.config.train
        if self.checkpoints is not None:
            self.checkpoints.expect_own()
        if self.run is not None and self.world.main:
            make_folder(self.run)
            self.metrics = MetricsFile(self.run / "metrics.jsonl", resume_at=self.step, tensorboard=t.tensorboard)
        self._say_schedule()
        self.module.train()
        if self.step == 0:
            self._evaluate()
        clock = time.perf_counter()
        with handled(self._stop_soon), closing(self.metrics) if self.metrics is not None else nullcontext():
            with ProgressDisplay(self.console, t.steps, self.step, t.log_every) as self._display:
                while self.step < t.steps and not self._must_stop():
                    for hook in self.hooks:
                        hook.before_step(self)
                    lr, norm = self._train_step()
                    self._display.advance(self.step)
                    for hook in self.hooks:
                        hook.after_step(self)
                    if self.step % t.log_every == 0 or self.step == t.steps:
                        clock = self._log(lr, norm, clock)
                    paused = time.perf_counter()
                    if self.step % t.eval_every == 0 or self.step == t.steps:
                        self._evaluate()
                    if self.step % t.save_every == 0:
                        self.save()
                    clock += time.perf_counter() - paused
            self.save()
            if self.checkpoints is not None:
                self.checkpoints.wait()
        return self.step >= t.steps

    def evaluate(self) -> dict[str, tuple[float, int]]:
        """Return the loss and the number of tokens of each validation set."""
        self.module.eval()
        result = {}
        for name, batches in self.validation.items():
            total = torch.zeros(2, dtype=torch.float64, device=self.device)
            # If each rank has a share of the classes, all ranks work on the same batch, and only the first counts it.
            left, size = iter(batches()), 1 if self._vocab_parallel else self.world.size
            while several := list(islice(left, size)):  # one for each rank
                mine = self.world.rank < len(several)  # FSDP2 needs the other ranks to take part, too
                batch = several[self.world.rank] if mine else several[0]
                count = self.objective.num_valid(batch)
                counts = on_device(count.clamp(min=1), self.device)
                with torch.no_grad(), self._autocast():
                    _, sums = self.module(on_device(batch, self.device), counts, self.step, False)
                if mine:
                    total += torch.stack([sums["loss"].double() * counts[0], counts[0] * int(count[0] > 0)])
            loss, tokens = self.world.sum(total).tolist()
            result[name] = (loss / max(tokens, 1), int(tokens))
        self.module.train()
        return result

    def save(self) -> None:
        """Begin to write a checkpoint, if the model was trained since the last one."""
        if self.checkpoints is None or self.checkpoints.is_saved(self.step):
            return
        state = getattr(self.data, "state", None)
        meta = {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "logged_step": self.logged_step,
            "recent": self._recent,
            "data": None if state is None else state(),
            "groups": self._settings,
            "about": self.about,
        }
        self.checkpoints.save(self.step, self.module, self.optimizer, meta, self._sums_of_all_ranks())
        for hook in self.hooks:
            hook.on_save(self)

    def say(self, text: str) -> None:
        say(self.console, text)

    def _say_schedule(self) -> None:
        """Say what the settings do to the learning rates of an optimizer that has its own."""
        if self._lr_is_given and (schedule := described(self.config)):
            own = ", ".join(dict.fromkeys(f"{share * self.config.optimizer.lr:g}" for share in self._lr_shares))
            other = any("initial_lr" in group for group in self.optimizer.param_groups)
            self.say(
                f"config.optimizer.schedule is laid over the optimizer's own learning rate, {own}: {schedule}. With "
                "schedule='constant', warmup_steps=0 and lr_scaling='none' in config.optimizer the rate stays as it is"
                + ("; what another scheduler sets is replaced in each step" if other else "")
            )

    # A step.

    def _train_step(self) -> tuple[float, Tensor | None]:
        """Take one optimizer step; return the learning rate and, on the device, the gradient's norm."""
        t = self.config.train
        lr = lr_of_step(self.step, self.config)
        for group, share in zip(self.optimizer.param_groups, self._lr_shares):
            group["lr"] = lr * share
        rows = self.micro_batch_size
        first = range(self.sequences + self.world.rank * rows, self.sequences + t.batch_size, self.world.size * rows)
        batches = [self.data.batch(i, rows) for i in first]
        num_valid = on_device(torch.stack([self.objective.num_valid(batch) for batch in batches]).sum(0), self.device)
        self.world.sum(num_valid)  # one number per head: all that the ranks must know of each other
        divisors = num_valid.clamp(min=1)
        detail = (self.step + 1) % t.log_every == 0 or self.step + 1 == t.steps
        for number, batch in enumerate(batches):
            with syncing(self.module, last=number == len(batches) - 1):
                with self._autocast():
                    loss, sums = self.module(on_device(batch, self.device), divisors, self.step, detail)
                (loss * self._share).backward()
            self._add(sums)
        norm = self._optimizer_step()
        if self.world.main:
            self._add({"tokens": num_valid[0].double()})
        if norm is not None and self.world.main:
            self._add({"skipped": (~norm.isfinite()).double()})
        self.step += 1
        self.sequences += t.batch_size
        return lr * self._lr_shares[0], norm

    def _optimizer_step(self) -> Tensor | None:
        """Clip and step, or skip the step if the gradient is not finite; return its norm."""
        if isinstance(self.optimizer, FusedOptimizer):  # does both itself, without waiting for the device
            self.optimizer.step()
            norm = self.optimizer.grad_norm
        else:
            most = self.config.optimizer.max_grad_norm or math.inf
            norm = clip_grad_norm_(self.model.parameters(), most)
            if bool(norm.isfinite()):  # torch's own optimizers cannot skip a step without this wait
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _add(self, sums: Sums) -> None:
        for name, value in sums.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _nothing(self) -> Sums:
        return {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in ("tokens", "skipped")}

    def _sums_of_all_ranks(self) -> Sums:
        """Sum up all ranks' sums, on the CPU: the only wait for the device."""
        mine = sorted(self.sums.items())  # on every rank in the same order
        flat = self.world.sum(torch.cat([t.double().flatten() for _, t in mine])).cpu()
        parts = flat.split([t.numel() for _, t in mine])
        return {name: part.view(t.shape).to(t.dtype) for (name, t), part in zip(mine, parts)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    # Evaluation and the log.

    def _evaluate(self) -> None:
        if not self.validation:
            return
        results = self.evaluate()
        losses = {source: loss for source, (loss, _) in results.items()}
        for hook in self.hooks:
            hook.on_evaluate(self, losses)
        since = int(self.sums["tokens"])  # after the last log line; counted on the first rank, which writes
        self._write(self.tokens + since, validation=losses, validation_mean=weighted_mean(results))
        self.say(f"step {self.step}: validation loss " + ", ".join(f"{name} {x:.3f}" for name, x in losses.items()))

    def _log(self, lr: float, norm: Tensor | None, clock: float) -> float:
        """Log a line about the steps since the last one; return the time at which the clock was read."""
        sums = self._sums_of_all_ranks()
        steps, now = self.step - self.logged_step, time.perf_counter()
        tokens, skipped = int(sums.pop("tokens")), int(sums.pop("skipped"))
        self.tokens, self.skipped = self.tokens + tokens, self.skipped + skipped
        self.seconds += now - clock
        speed = tokens / (now - clock)
        loss = float(sums["loss"]) / steps
        values: dict[str, Any] = {"loss": loss, "lr": lr, "tokens_per_s": speed, "sequences": self.sequences}
        if norm is not None:
            values["grad_norm"] = norm.item()
        values["memory_bytes"] = peak_memory_bytes(self.device)
        values |= self.objective.logged(sums, steps)
        if self.skipped:
            values["skipped"] = self.skipped
        if skipped:
            self.say(f"{self.skipped} steps so far had a gradient that is not finite and were skipped")
        if self._is_spike(loss):
            values["spike"] = True
            self.say(f"step {self.step}: the loss has jumped to {loss:.3f}, from about {self._recent[-1]:.3f}")
        if math.isfinite(loss):
            self._recent = [*self._recent, loss][-_REMEMBERED:]
        for hook in self.hooks:
            hook.on_log(self, values)
        self._write(self.tokens, **values)
        self._display.show(self.step, loss, lr, speed, now - clock)
        self.sums, self.logged_step = self._nothing(), self.step
        most = self.config.train.max_skipped
        if most and self.skipped > most:
            if self.checkpoints is not None:
                self.checkpoints.wait()
            raise NonFinite(
                f"{self.skipped} steps had a gradient that is not finite, more than train.max_skipped={most}"
                + ("" if self.checkpoints is None else f"; {self.checkpoints.last_good()}")
            )
        return now

    def _is_spike(self, loss: float) -> bool:
        recent = self._recent
        if len(recent) < _REMEMBERED // 2:
            return False
        mean = sum(recent) / len(recent)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in recent) / len(recent))
        return not loss <= mean + SPIKE * max(deviation, 0.01)

    def _write(self, tokens: int, **values: Any) -> None:
        if self.metrics is None or self.checkpoints is None:
            return
        try:
            self.metrics.write(step=self.step, tokens=tokens, **values)
        except OSError as e:
            raise OSError(f"metrics.jsonl could not be written: {e}; {self.checkpoints.last_good()}") from e

    # Signals.

    def _must_stop(self) -> bool:
        """Return True on all ranks after a signal to one of them, or a checkpoint that could not be written.

        Several ranks look only at steps that are logged, where they wait for each other anyway.
        """
        stop = self._stop or (self.checkpoints is not None and self.checkpoints.failed)
        if self.world.size == 1:
            return stop
        return self.step % self.config.train.log_every == 0 and self.world.any(stop)

    def _stop_soon(self, number: int, frame: Any) -> None:
        """End the run after a step; a second SIGINT or SIGTERM is not caught. A closed terminal may send several."""
        self._stop = True
        if number != signal.SIGHUP:
            signal.signal(number, signal.default_int_handler)
