"""Parts of a run, as they are handed on, without training; tests/train/test_run.py trains."""

import io
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

import llmfast.train.run as module
from llmfast._gpus import named
from llmfast._units import in_bytes
from llmfast.data import FIM, ByteTokenizer, Dataset, Mixed, prepare
from llmfast.models import Decoder, DecoderConfig
from llmfast.models.cost import step_flops
from llmfast.train.config import Config, decoder_config, dump_config, load_config
from llmfast.train.earlier import digest
from llmfast.train.estimate import estimate_run
from llmfast.train.objective import NextToken
from llmfast.train.parallel import World
from llmfast.train.settings import ConfigError

CPU = torch.device("cpu")


class Enough(Exception):
    """End of what is looked at."""


@pytest.mark.parametrize("profile", [False, True])
def test_the_trainer_gets_every_part(profile: bool, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, Any]] = []

    def trainer(*parts: Any, **options: Any) -> None:
        given.append((parts, options))
        raise Enough

    monkeypatch.setattr(module, "Trainer", trainer)
    config = load_config(None, [*settings, "name=x", "train.dtype=bfloat16", "train.param_dtype=bfloat16"])
    console = Console(quiet=True)
    with pytest.raises(Enough):
        module.train(config, console=console, profile=profile)
    (((model, objective, make, order, used), options),) = given
    assert isinstance(model, Decoder) and {p.dtype for p in model.parameters()} == {torch.bfloat16} and used is config
    assert isinstance(objective, NextToken) and objective.sources == config.data.sources and make.args == (config,)
    assert isinstance(order, Mixed) and order.mixture.phases[0].total == 8 * 2
    run = Path(config.runs) / "x"
    hooks = [type(hook) for hook in options.pop("hooks")]
    assert hooks == [module.Shares, module.Utilisation, *([module.Profile] if profile else [])]
    assert options.pop("validation").keys() == set(config.data.sources) and not run.exists()
    assert options == {
        **{"run": run, "world": World(CPU), "dtype": torch.bfloat16, "console": console},
        "about": {"settings": asdict(config)},
    }


def test_hooks_are_those_that_there_is_something_to_say_of(tmp_path: Path) -> None:
    decoder, other = Decoder(DecoderConfig(50, width=16, layers=1, heads=2)), torch.nn.Linear(1, 1)
    usual, quiet = [module.Shares, module.Utilisation], Console(quiet=True)
    order: Any = object()
    for model, trace, kinds in (
        (decoder, None, usual),
        (other, None, usual[:1]),
        (decoder, tmp_path, [*usual, module.Profile]),
        (other, tmp_path, [module.Shares, module.Profile]),
    ):
        hooks: list[Any] = module._hooks(Config(), model, order, World(CPU), quiet, trace)
        assert [type(hook) for hook in hooks] == kinds and hooks[0]._data is order
        assert trace is None or hooks[-1]._file == tmp_path / "trace.json"


@pytest.mark.parametrize("rank", [0, 2])
def test_weights_are_drawn_by_the_seed_and_the_rest_by_that_of_the_rank(
    rank: int, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    make = module.make_model
    monkeypatch.setattr(module.World, "join", lambda device: World(device, rank))
    monkeypatch.setattr(module, "make_model", lambda *args: seeds.append(torch.initial_seed()) or make(*args))
    monkeypatch.setattr(module, "_print_plan", lambda *args: seeds.append(torch.initial_seed()))
    module.train(load_config(None, [*settings, "train.seed=5"]), dry_run=True, console=Console(quiet=True))
    assert seeds == [5, 5 + rank]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_plan_tells_how_well_documents_fit(rate: float, settings: list[str], corpus: Path) -> None:
    """Also where rows are rearranged; of documents end to end, there is nothing to tell."""
    config = load_config(None, [*settings, "data.packing=best_fit", f"data.fim_rate={rate}"])
    for packing in ("best_fit", "concat"):
        fim: Any = (lambda tokenizer: FIM(tokenizer, rate=rate)) if rate else None
        data = prepare([f"mine={corpus}"], tokenizer="bytes", seq_len=32, held_out=0.3, packing=packing, fim=fim)  # type: ignore[arg-type]
        out = io.StringIO()
        order: Any = SimpleNamespace(mixture=mock.Mock(table=lambda: [("a",)], epochs=dict))
        model = torch.nn.Linear(1, 1)
        module._print_plan(config, data, order, model, "cpu", World(CPU), Console(file=out, width=200))
        rows = data.train["mine"]
        assert (f"mine: {getattr(rows, 'rows', rows)}\n" in out.getvalue()) == (packing == "best_fit")
    assert module._memory_in_words(config, model, 1) == ""


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("pretrained", ["", "there"])
def test_a_new_run_has_its_own_tokenizer_and_what_a_model_needs(
    resume: bool, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Any] = []
    monkeypatch.setattr(module, "copy_files", lambda *where: copied.append(where))
    config = load_config(None, ["train.steps=7"])
    config.model.pretrained = pretrained
    trainer: Any = SimpleNamespace(config=config, about={"settings": 1})
    (run := tmp_path / "runs" / "x").mkdir(parents=True)
    (run / "tokenizer.json").write_text("its own")
    module._write_settings(trainer, Dataset({}, {}, ByteTokenizer()), run, resume=resume)
    assert ((run / "tokenizer.json").read_text() == "its own") == resume
    assert copied == ([(Path("there"), run)] if pretrained and not resume else [])
    assert trainer.about == {"settings": 1, "tokenizer": digest(run / "tokenizer.json")}
    assert (run / "config.toml").read_text() == dump_config(config)


def test_a_run_without_a_name_takes_the_first_that_is_free(tmp_path: Path) -> None:
    for name in ("demo", "demo-2", "demo-4"):
        (tmp_path / name).mkdir()
    config = Config(runs=str(tmp_path))
    assert module._choose_run(config, resume=False, overwrite=False) == tmp_path / "demo-3" and config.name == "demo-3"
    config = Config(name="mine", runs=str(tmp_path))
    assert module._choose_run(config, resume=False, overwrite=True) == tmp_path / "mine"
    with pytest.raises(FileNotFoundError, match=rf"^nothing to resume: {tmp_path / 'mine'} holds no run$"):
        module._choose_run(config, resume=True, overwrite=False)


def test_every_setting_of_the_model_reaches_the_decoder() -> None:
    more = {"width": 48, "layers": 3, "heads": 4, "ffn_width": 80, "tie_embeddings": False, "mtp": "sequential"}
    more |= {"mtp_heads": 2, "mtp_concat": "hidden_first", "mtp_hidden": "post_norm", "mtp_repeated_layer": True}
    config = Config()
    vars(config.model).update(more | {"mtp_detach": True})
    assert vars(config.model).keys() == more.keys() | {"mtp_detach", "pretrained"}, "a setting that is not known here"
    made = decoder_config(config, 77)
    assert {name: getattr(made, name) for name in more} == more and made.vocab_size == 77 and made.mtp_detach
    config.model.pretrained = "there"
    with pytest.raises(ConfigError, match=r"^model\.pretrained must be '' for a decoder of .* shape; got 'there'$"):
        decoder_config(config, 77)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_dry_run_tells_what_each_gpu_would_hold(parallel: str) -> None:
    model = Decoder(DecoderConfig(300, width=32, layers=2, heads=2))
    config = load_config(None, [f"train.parallel={parallel}", "train.batch_size=4", "data.seq_len=64"])
    told = [module._memory_in_words(config, model, gpus) for gpus in (1, 2, 4)]
    peaks = [in_bytes(estimate_run(config, model.config, gpus=gpus).peak) for gpus in (1, 2, 4)]
    assert len({*peaks}) == 3, "too alike to tell"
    told_of = zip(("a", "each", "each"), peaks)
    assert told == [f"{of} GPU would hold about {peak}, by `llmfast plan memory`; " for of, peak in told_of]


@pytest.mark.parametrize("gpu", ["", "NVIDIA H100 80GB HBM3", "Unheard-of"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_share_of_the_peak_is_of_all_gpus(gpu: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU and on a GPU that is not known, there is none; of the latter it is said."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    out, model = io.StringIO(), Decoder(DecoderConfig(300, width=32, layers=2, heads=2))
    config = load_config(None, ["data.seq_len=64"])
    world = World(torch.device("cuda" if gpu else "cpu"), size=ranks)
    hook = module.Utilisation(config, model, world, Console(file=out, width=200))
    values: dict[str, Any] = {"tokens_per_s": 1e6}
    trainer: Any = None
    hook.on_log(trainer, values)
    told = "no MFU is logged: the peak rate of Unheard-of is not known\n" if gpu == "Unheard-of" else ""
    assert out.getvalue() == told and ("mfu" in values) == ("H100" in gpu)
    if "H100" in gpu:
        known = named(gpu)
        assert known is not None
        per_token = step_flops(model.config, 1, 64).flops
        assert values["mfu"] == pytest.approx(1e6 * per_token / (known.tensor_cores * ranks))
