"""Comparisons of what `llmfast export` writes with what transformers reads: logits, tokens and text."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmfast.cli import main
from llmfast.mtp import speculative_generate
from llmfast.train import load_run
from support.runs import TEXTS, write_run

transformers = pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")

KINDS = [
    [],
    ["model.tie_embeddings=false", "model.ffn_width=48"],
    ["model.mtp=parallel", "model.mtp_heads=2"],
    ["model.mtp=sequential", "model.mtp_heads=2"],
]


def exported(tmp_path: Path, *settings: str, tokenizer: str = "bytes", flags: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """Make a run, export it, and open it with ours and with transformers."""
    transformers.logging.set_verbosity_error()
    write_run(tmp_path / "run", *settings, tokenizer=tokenizer)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), *flags]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    return *load_run(tmp_path / "run"), theirs, transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_logits_are_ours(settings: list[str], tmp_path: Path) -> None:
    flags = ("--depths",) if "model.mtp=sequential" in settings else ()
    model, _, theirs, _ = exported(tmp_path, *settings, flags=flags)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens = torch.randint(0, 256, (3, 64))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens) @ model.unembedding.T, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays(tmp_path: Path) -> None:
    model, _, theirs, _ = exported(tmp_path, "train.param_dtype=bfloat16")
    assert theirs.dtype == torch.bfloat16
    state = theirs.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], model.embedding.weight)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_tokens_are_ours(kind: str, tmp_path: Path) -> None:
    _, tokenizer, theirs, read = exported(tmp_path, tokenizer=kind)
    every_byte_that_utf8_has = "".join(map(chr, [*range(0x800), 0x4E2D, 0x1F600, 0x10FFFF]))
    for text in [*TEXTS[:3], "  two  spaces\n\tand 'don't' 12345  ", "", every_byte_that_utf8_has]:
        ids = tokenizer.encode(text).tolist()
        assert read(text)["input_ids"] == ids and read.decode(ids) == text
    special = tokenizer.special_ids
    assert read.eos_token_id == tokenizer.eot_id == theirs.generation_config.eos_token_id
    assert read.pad_token_id == special["<|pad|>"] and read.model_max_length == 64
    assert read("a<|endoftext|>")["input_ids"] == [*tokenizer.encode("a"), tokenizer.eot_id]
    assert [read.convert_tokens_to_ids(token) for token in special] == list(special.values())
    assert read.decode([tokenizer.eot_id], skip_special_tokens=True) == ""


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_generates_the_same_text_greedily(kind: str, tmp_path: Path) -> None:
    model, tokenizer, theirs, read = exported(tmp_path, tokenizer=kind)
    for text in TEXTS[:4]:
        prompt = torch.as_tensor(tokenizer.encode(text), dtype=torch.int64)[:20]
        ours = model.generate(prompt, 30, context=64, temperature=0)
        found = theirs.generate(prompt[None], max_new_tokens=30, do_sample=False, eos_token_id=None)
        assert torch.equal(found[0], ours) and len(found[0]) == len(prompt) + 30
    batch = read(["def f", "x"], return_tensors="pt", padding=True, padding_side="left")
    assert theirs.generate(**batch, max_new_tokens=3, do_sample=False).shape[0] == 2


@pytest.mark.parametrize("settings", KINDS[2:], ids=str)
def test_the_command_writes_what_transformers_does(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compare also with drafts of the further heads, and up to the end of text where that comes."""
    model, tokenizer, theirs, _ = exported(tmp_path, *settings)
    for text in TEXTS[:3]:
        prompt = torch.as_tensor(tokenizer.encode(text[:9]), dtype=torch.int64)
        found = theirs.generate(prompt[None], max_new_tokens=40, do_sample=False, eos_token_id=None)[0]
        assert torch.equal(speculative_generate(model, prompt, 40).tokens, found)
        until_end = theirs.generate(prompt[None], max_new_tokens=40, do_sample=False)[0, len(prompt) :]
        capsys.readouterr()
        assert main(["generate", str(tmp_path / "run"), f"--prompt={text[:9]}", "--max-tokens=40"]) == 0
        out, err = capsys.readouterr()
        assert out.removesuffix("\n") == tokenizer.decode(until_end.numpy()).removesuffix("\n") and "per pass" in err


def test_trains_then_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go from text to transformers with what the trainer itself has written."""
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.txt").write_text(TEXTS[i] * 20)
    settings = [
        "data.sources=['texts']",
        "data.vocab_size=300",
        "data.seq_len=32",
        "data.held_out=0.3",
        "model.width=32",
        "model.layers=1",
        "model.heads=2",
        "train.steps=4",
        "train.sample_tokens=4",
        "train.device=cpu",
    ]
    assert main(["train", *(f"--set={s}" for s in settings)]) == 0
    assert main(["export", "runs/demo", "hf"]) == 0
    ask = transformers.pipeline("text-generation", model="hf", device="cpu")
    ((found,),) = ask(["def f"], max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("def f")
