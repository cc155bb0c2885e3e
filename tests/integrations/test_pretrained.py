"""Models of Hugging Face through the trainer: from a folder, trained, resumed, and back to a folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule

from llmfast.cli import main
from llmfast.data import BPETokenizer, load_tokenizer
from llmfast.train import Config, load_config, load_run, train
from llmfast.train.metrics import read_metrics
from llmfast.train.trainer import Hooks, Trainer
from support.ranks import Ranks
from support.runs import TEXTS

transformers = pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")

Make = Callable[..., nn.Module]
MODELS = ["llama", "tied", "qwen3", "gemma2", "gpt2"]
END, BEGIN = "</s>", "<s>"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for i in range(24):
        (tmp_path / "texts" / f"{i}.txt").write_text(TEXTS[i] * (1 + i % 3))
    return tmp_path / "texts"


def write_tokenizer(folder: Path, *, begins: bool) -> None:
    """Write the files of a tokenizer whose texts end with `END` and may begin with `BEGIN`."""
    import tokenizers

    BPETokenizer.train(TEXTS, 310).save(folder / "ours.json")
    content = json.loads((folder / "ours.json").read_text(encoding="utf-8"))
    (folder / "ours.json").unlink()
    backend = tokenizers.Tokenizer.from_str(json.dumps(content).replace("<|endoftext|>", END))
    backend.add_special_tokens([BEGIN])
    if begins:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, backend.token_to_id(BEGIN))]
        )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=BEGIN)
    made.save_pretrained(folder)


@pytest.fixture
def folder_of(make: Make, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a tiny model with random weights and its tokenizer, as one would download it."""

    def write(name: str = "llama", *, begins: bool = True, **changes: Any) -> Path:
        folder = tmp_path / name
        make(name, **changes).save_pretrained(folder)
        write_tokenizer(folder, begins=begins)
        return folder

    return write


def settings_of(tmp_path: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"runs={tmp_path / 'runs'}",
        f"data.sources=['texts={tmp_path / 'texts'}']",
        f"model.pretrained={folder}",
        "data.seq_len=32",
        "data.held_out=0.3",
        "train.steps=4",
        "train.batch_size=4",
        "train.micro_batch_size=2",
        "train.log_every=1",
        "train.eval_rows=4",
        "train.sample_tokens=4",
        "train.device=cpu",
        "optimizer.warmup_steps=2",
        *more,
    ]


def config_of(tmp_path: Path, folder: Path, *more: str) -> Config:
    return load_config(None, settings_of(tmp_path, folder, *more))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(str(run / "model.safetensors"))


class Seen(Hooks):
    """Batches of a run, and the trainer that read them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Trainer.fit

        def fit(trainer: Trainer) -> bool:
            self.trainer = trainer
            trainer.hooks.append(self)
            return original(trainer)

        monkeypatch.setattr(Trainer, "fit", fit)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_stock_loop(
    name: str, folder_of: Callable[..., Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with F.cross_entropy on the model's logits of each document alone, and torch's AdamW."""
    folder, seen = folder_of(name, begins=name != "gpt2"), Seen(monkeypatch)
    run = train(config_of(tmp_path, folder, "optimizer.schedule=constant", "optimizer.weight_decay=0.1"))
    o = seen.trainer.config.optimizer
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
    losses = []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = o.lr * min(1.0, (step + 1) / 2)
        batch = seen.trainer.data.batch(4 * step, 4)
        assert batch.document_ids.max() > 0
        total = torch.zeros(())
        for tokens, labels, documents in zip(batch.tokens, batch.labels, batch.document_ids):
            for number in documents.unique():
                inside = documents == number
                logits = model(input_ids=tokens[inside][None], use_cache=False).logits[0]
                total = total + F.cross_entropy(logits.float(), labels[inside], reduction="sum")
        loss = total / batch.num_valid
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert found == pytest.approx(losses, abs=1e-4) and len({round(x, 3) for x in losses}) == 4
    again = transformers.AutoModelForCausalLM.from_pretrained(run)
    assert type(again) is type(model)
    with torch.no_grad():  # and not the weights, as a bias of keys has gradients of rounding errors alone
        found, wanted = (m.eval()(input_ids=batch.tokens).logits for m in (again, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_from_a_folder_to_a_folder(
    name: str, folder_of: Callable[..., Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(name)
    more = ["train.param_dtype=bfloat16", "optimizer.master_weights=split16", "train.checkpoint_activations=true"]
    settings = settings_of(tmp_path, folder, "name=one", *more)
    assert main(["train", *(f"--set={s}" for s in settings)]) == 0
    run = tmp_path / "runs" / "one"
    lines = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert lines[-1] < lines[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run, dtype="auto").eval()
    read = transformers.AutoTokenizer.from_pretrained(run)
    assert theirs.dtype == torch.bfloat16 and read("a b").input_ids[0] == read.convert_tokens_to_ids(BEGIN)
    assert read.eos_token == END
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(before[key], t.float()) for key, t in theirs.state_dict().items())

    prompt = read("def f1(x", return_tensors="pt").input_ids
    beyond = list(range(len(read), theirs.config.vocab_size))
    assert beyond
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": read.eos_token_id, "suppress_tokens": beyond}
    wanted = theirs.generate(prompt, **options)[0, prompt.shape[1] :]
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt=def f1(x", "--max-tokens=40", "--device=cpu"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == read.decode(wanted, skip_special_tokens=True).rstrip("\n")
    model, tokenizer = load_run(run)
    assert type(model) is type(theirs) and not model.training
    assert [*tokenizer.start_ids, *tokenizer.encode("a b")] == read("a b").input_ids
    assert tokenizer.eot_id == read.eos_token_id


def test_recomputed_activations_are_the_same(folder_of: Callable[..., Path], corpus: Path, tmp_path: Path) -> None:
    """Compare bit for bit, with dropout, and the files that are left."""
    folder = folder_of("gpt2", resid_pdrop=0.3)
    kept, again = (
        train(config_of(tmp_path, folder, f"name=is-{name}", f"train.checkpoint_activations={name}"))
        for name in ("false", "true")
    )
    first, second = weights(kept), weights(again)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert {path.name for path in again.iterdir()} == {
        *(path.name for path in folder.iterdir()),
        *("checkpoint-00000004", "config.toml", "loss.png", "metrics.jsonl", "sample.txt"),
    }
    assert {path.stat().st_mode for path in again.glob("*.*") if path.is_file()} == {
        (again / "config.toml").stat().st_mode
    }


def test_resumes_bit_for_bit(folder_of: Callable[..., Path], corpus: Path, tmp_path: Path) -> None:
    """Also resume after the folder that it began with is gone, and a model with dropout."""
    fit = Trainer.fit
    for name in ("gpt2", "tied"):
        folder = folder_of(name, **({"resid_pdrop": 0.3} if name == "gpt2" else {}))
        more = ["train.steps=6", "train.save_every=3"]
        whole = train(config_of(tmp_path, folder, *more, f"name={name}-whole"))
        config = config_of(tmp_path, folder, *more, f"name={name}-parts")

        class Stop(Hooks):
            def before_step(self, trainer: Trainer) -> None:
                if trainer.step == 3:
                    trainer._stop = True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "fit", lambda self: (self.hooks.append(Stop()), fit(self))[1])
            with pytest.raises(KeyboardInterrupt):
                train(config)
        parts = whole.with_name(f"{name}-parts")
        stopped = [line["step"] for line in read_metrics(parts / "metrics.jsonl")][-1]
        assert 3 <= stopped < 6 and not (parts / "model.safetensors").exists()
        assert type(load_run(parts).model) is type(transformers.AutoModelForCausalLM.from_pretrained(folder))
        shutil.rmtree(folder)
        arguments = ["train", "--resume", f"--name={parts.name}", f"--set=runs={parts.parent}"]
        assert main(arguments) == 0
        first, second = weights(whole), weights(parts)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        logs = [
            [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
            for run in (whole, parts)
        ]
        assert logs[0] == logs[1]


@pytest.mark.parametrize("finished", [True, False])
def test_goes_on_with_new_text(
    finished: bool, folder_of: Callable[..., Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begin from a run, finished or not, and from a folder that no run has written."""
    (tmp_path / "new").mkdir()
    for i in range(12):
        (tmp_path / "new" / f"{i}.txt").write_text(f"{i}|{i * i}|x\n" * 30)
    run = train(config_of(tmp_path, folder_of(), "name=before", "train.save_every=2"))
    old = [line for line in read_metrics(run / "metrics.jsonl") if "validation" in line][-1]["validation"]["texts"]
    if not finished:
        (run / "model.safetensors").unlink()
    small = [s for s in settings_of(tmp_path, run) if s.startswith(("train", "optimizer", "runs"))]
    further = [f"--target=new={tmp_path / 'new'}", "--name=after", *(f"--set={s}" for s in small)]
    assert main(["continue", str(run), *further]) == 0
    after = run.with_name("after")
    first = next(line for line in read_metrics(after / "metrics.jsonl") if "validation" in line)
    assert first["validation"]["texts"] == pytest.approx(old, rel=1e-5)
    assert "... of new" in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(after) is not None
    shutil.rmtree(run)
    assert main(["train", "--resume", "--name=after", f"--set=runs={after.parent}", "--set=train.steps=5"]) == 0
    if finished:
        more = ["--set=data.seq_len=32", "--set=data.held_out=0.3", "--overwrite"]
        assert main(["continue", str(tmp_path / "llama"), *further, *more]) == 2
        assert "--general must name the old text" in capsys.readouterr().err
        assert main(["continue", str(tmp_path / "llama"), *further, *more, f"--general={tmp_path / 'texts'}"]) == 0
        assert load_config(after / "config.toml").model.pretrained == str(tmp_path / "llama")


def trained_by(rank: int, world: int, *overrides: str) -> int:
    """Train on the ranks of one group, which ends with the run; return how many modules FSDP2 has sharded."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        train(load_config(None, overrides))
    return sum(isinstance(module, FSDPModule) for module in seen.trainer.module.modules())


@pytest.mark.parametrize("name", ["tied", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_do_what_one_does(
    parallel: str, name: str, folder_of: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    """Compare losses and weights; then resume on one rank what two have begun."""
    folder = folder_of(name)
    alone = train(config_of(tmp_path, folder, "name=alone", "optimizer.name=sgd", "optimizer.lr=0.1"))
    ranks = Ranks(2, tmp_path)
    try:
        more = ["name=both", "optimizer.name=sgd", "optimizer.lr=0.1", f"train.parallel={parallel}"]
        sharded = ranks.run(trained_by, *settings_of(tmp_path, folder, *more))
    finally:
        ranks.close()
    assert sharded == [0 if parallel == "ddp" else 3] * 2  # both blocks, and the rest
    both = alone.with_name("both")
    first, second = (
        [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] for run in (alone, both)
    )
    assert first == pytest.approx(second, abs=1e-5)
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(run).state_dict() for run in (alone, both))
    assert one.keys() == two.keys()
    for key, t in one.items():
        torch.testing.assert_close(two[key], t, rtol=1e-4, atol=1e-5, msg=key)
    arguments = ["train", "--resume", "--name=both", f"--set=runs={both.parent}", "--set=train.steps=6"]
    assert main(arguments) == 0
    assert read_metrics(both / "metrics.jsonl")[-1]["step"] == 6


def test_the_text_is_what_the_tokenizer_makes_of_it(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    for begins in (True, False):
        folder = folder_of("llama", begins=begins)
        tokenizer, theirs = (
            load_tokenizer(folder / "tokenizer.json"),
            transformers.AutoTokenizer.from_pretrained(folder),
        )
        for text in TEXTS[:4]:
            assert [*tokenizer.start_ids, *tokenizer.encode(text)] == theirs(text).input_ids
        assert len(tokenizer.start_ids) == begins and tokenizer.eot_id == theirs.convert_tokens_to_ids(END)
        shutil.rmtree(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 100)


def no_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))


def no_such_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')


def a_larger_tokenizer(folder: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([f"word{i}" for i in range(40)])
    backend.save(str(folder / "tokenizer.json"))


def fewer_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = weights(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "more", "message"),
    [
        (
            shutil.rmtree,
            [],
            "must be the folder of a model, with config.json; there is none, and nothing is downloaded",
        ),
        (no_config, [], "must be the folder of a model, with config.json; there is none"),
        (no_weights, [], "must hold the weights, in *.safetensors; there are none"),
        (no_tokenizer, [], "must have a tokenizer.json; there is none"),
        (damaged, [], "transformers cannot read"),
        (fewer_weights, [], "must be all of a LlamaForCausalLM; missing ['model.layers.1.mlp.up_proj.weight']"),
        (no_head, [], "must hold a causal language model with its head; its config.json has LlamaModel"),
        (no_such_type, [], "must hold a causal language model with its head; its config.json has T5For"),
        (a_larger_tokenizer, [], "its tokenizer must be the model's own, with at most its 320 ids; got one of 35"),
        (None, ["data.tokenizer=bytes"], "data.tokenizer must be left out, or be that of the model"),
        (None, ["model.width=64"], "model.width must be left out with model.pretrained="),
        (None, ["model.mtp=sequential", "model.mtp_heads=1"], "model.mtp must be left out with model.pretrained="),
        (None, ["train.init_from=x"], "train.init_from must be left out with model.pretrained="),
        (None, ["train.vocab_parallel=true", "model.tie_embeddings=false"], "must be left out with model.pretrained="),
        (None, ["data.seq_len=65"], "data.seq_len must be at most the 64 positions of this LlamaForCausalLM; got 65"),
        (None, ["data.fim_rate=0.5"], "data.fim_rate must be 0: this model's texts begin with a token"),
    ],
)
def test_mistakes_are_one_line_before_any_work(
    damage: Any,
    more: list[str],
    message: str,
    folder_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folder_of()
    if damage is not None:
        damage(folder)
    monkeypatch.setattr("llmfast.train.run.prepare_data", lambda *_: pytest.fail("data was read"))
    capsys.readouterr()
    assert main(["train", *(f"--set={s}" for s in settings_of(tmp_path, folder, *more))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("llmfast: error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_model_that_mixes_documents_is_refused(
    folder_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("gpt")
    assert main(["train", *(f"--set={s}" for s in settings_of(tmp_path, folder))]) == 2
    error = capsys.readouterr().err
    assert "OpenAIGPTLMHeadModel cannot be trained on rows of several documents" in error and error.count("\n") == 1


def test_export_and_plan_say_that_they_cannot(
    folder_of: Callable[..., Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(config_of(tmp_path, folder_of(), "name=one", "train.steps=1"))
    for arguments, message in (
        (["export", str(run), str(tmp_path / "hf")], "RUN must have trained llmfast's own decoder;"),
        (["plan", "memory", "--config", str(run / "config.toml")], "model.pretrained must be '' for a decoder"),
        (
            ["train", f"--set=model.pretrained={run}", f"--set=runs={run.parent}", "--name=one", "--overwrite"],
            "model.pretrained must be another folder than the run's own",
        ),
        (
            [
                "train",
                f"--set=train.init_from={run}",
                f"--set=data.tokenizer={run / 'tokenizer.json'}",
                "--name=two",
                *(f"--set={s}" for s in settings_of(tmp_path, run) if not s.startswith("model.")),
            ],
            f"model.pretrained must be that of the weights in train.init_from={run}, '{tmp_path / 'llama'}'; got ''",
        ),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (run / "model.safetensors").exists()
