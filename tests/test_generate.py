"""`llmfast generate`: what it prints, what it refuses, and that text comes in whole characters."""

import argparse
import re
from pathlib import Path

import pytest
import torch

from llmfast import generate
from llmfast.cli import main
from llmfast.data import ByteTokenizer, fim_prompt, load_tokenizer
from llmfast.generate import TextStream
from llmfast.models import Decoder
from support.runs import TEXTS, tokenizer_of, write_run

KINDS = [
    [],
    ["model.mtp=parallel", "model.mtp_heads=3"],
    ["model.mtp=sequential", "model.mtp_heads=2"],
    ["model.mtp=shared", "model.mtp_heads=2"],
]


def text_after(model: Decoder, run: Path, prompt: torch.Tensor, count: int, **options: float) -> str:
    """Generate without the command, in one piece, up to the end of text."""
    seed = int(options.pop("seed", 0))
    generator = torch.Generator().manual_seed(seed)
    options = {"temperature": 0, **options}
    found = model.generate(prompt, count, context=64, generator=generator, **options).tolist()[len(prompt) :]  # type: ignore[arg-type]
    tokenizer = load_tokenizer(run / "tokenizer.json")
    end = found.index(tokenizer.eot_id) if tokenizer.eot_id in found else len(found)
    return tokenizer.decode(found[:end])


def encoded(run: Path, text: str) -> torch.Tensor:
    return torch.as_tensor(load_tokenizer(run / "tokenizer.json").encode(text), dtype=torch.int64)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_text_is_the_models(
    settings: list[str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    model = write_run(run, *settings, tokenizer=kind)
    for flags, options in (
        ([], {}),
        (["--temperature=0.8", "--top-p=0.9", "--seed=3"], {"temperature": 0.8, "top_p": 0.9, "seed": 3}),
    ):
        wanted = text_after(model, run, encoded(run, "def f"), 20, **options)
        for more in [[], ["--no-speculative"]]:
            assert main(["generate", str(run), "--prompt=def f", "--max-tokens=20", *flags, *more]) == 0
            out, err = capsys.readouterr()
            assert out == wanted + "\n" * (not wanted.endswith("\n"))
            drafted = settings[:1] in (["model.mtp=parallel"], ["model.mtp=sequential"]) and more == []
            pattern = r"llmfast: \d+ tokens after the prompt, [\d,]+ per second"
            if drafted:
                pattern += r"; \d\.\d\d per pass, drafts accepted by head: \d+ %, \d+ %"
            assert re.fullmatch(pattern + "\n", err), err


@pytest.mark.parametrize("settings", KINDS[:3], ids=str)
def test_several_prompts(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each goes on as it does alone, under a line that repeats it."""
    run = tmp_path / "run"
    model = write_run(run, *settings)
    prompts = ["def f", "x = ", "a longer beginning"]
    assert main(["generate", str(run), *(f"--prompt={prompt}" for prompt in prompts), "--max-tokens=12"]) == 0
    out, err = capsys.readouterr()
    texts = [text_after(model, run, encoded(run, prompt), 12) for prompt in prompts]
    wanted = [f"--- {p}\n{text}" + "\n" * (not text.endswith("\n")) for p, text in zip(prompts, texts)]
    assert out == "\n".join(wanted) and err.count("per second") == 3
    assert main(["generate", str(run), "--prompt=a", f"--prompt={'b' * 80}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--prompt 2 of 2 must be shorter than the model's context of 64 tokens; got 80" in err


def test_a_text_begins_with_what_its_tokenizer_puts_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, start = tmp_path / "run", (7, 8)
    model = write_run(run)
    monkeypatch.setattr(ByteTokenizer, "start_ids", start)
    for prompts in (["def f"], ["def f", "x = "]):
        assert main(["generate", str(run), *(f"--prompt={prompt}" for prompt in prompts), "--max-tokens=12"]) == 0
        out = capsys.readouterr().out
        for prompt in prompts:
            ids = torch.cat([torch.tensor(start), encoded(run, prompt)])
            assert text_after(model, run, ids, 12) != text_after(model, run, ids[2:], 12)
            assert text_after(model, run, ids, 12) in out


def test_stops_at_the_end_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_model

    for settings in KINDS[:3]:
        run = tmp_path / settings[0] if settings else tmp_path / "plain"
        model = write_run(run, *settings, "model.tie_embeddings=false")
        prompt = encoded(run, "abc")
        third = int(model.generate(prompt, 3, context=64, temperature=0)[-1])
        with torch.no_grad():  # where it said this, it now says end of text
            model.unembedding[[third, 256]] = model.unembedding[[256, third]]
        save_model(model, str(run / "model.safetensors"))
        tokens = model.generate(prompt, 20, context=64, temperature=0).tolist()
        assert 256 in tokens
        assert main(["generate", str(run), "--prompt=abc", "--max-tokens=20"]) == 0
        out, err = capsys.readouterr()
        wanted = ByteTokenizer().decode(tokens[3 : tokens.index(256)])
        assert out.removesuffix("\n") == wanted.removesuffix("\n")
        assert err.startswith(f"llmfast: {tokens.index(256) - 3} tokens")


def test_stops_at_the_end_of_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings in KINDS[:3]:
        run = tmp_path / settings[0] if settings else tmp_path / "plain"
        model = write_run(run, *settings)
        prompt = "x" * 50
        assert main(["generate", str(run), f"--prompt={prompt}"]) == 0
        out, err = capsys.readouterr()
        wanted = text_after(model, run, encoded(run, prompt), 14)
        assert out.removesuffix("\n") == wanted.removesuffix("\n")
        assert err.endswith("; stopped at the end of the context of 64\n") or 256 in model.generate(
            encoded(run, prompt), 14, context=64, temperature=0
        )


def test_fills_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, variant in (
        (["data.fim_rate=0.5"], 0),
        (["data.fim_rate=0.5", "data.fim_spm_rate=1"], 2),
        (["data.fim_rate=0.5", "data.fim_spm_rate=1", "data.fim_spm_variant=1"], 1),
    ):
        run = tmp_path / str(variant)
        model = write_run(run, *settings)
        for prefix, suffix in (("def ", "return"), ("def ", ""), ("", "return")):
            prompt = torch.from_numpy(fim_prompt(ByteTokenizer(), prefix, suffix, spm_variant=variant))  # type: ignore[arg-type]
            sides = [f"--{name}={text}" for name, text in (("prefix", prefix), ("suffix", suffix)) if text]
            assert main(["generate", str(run), *sides, "--max-tokens=12"]) == 0
            wanted = text_after(model, run, prompt, 12)
            assert capsys.readouterr().out.removesuffix("\n") == wanted.removesuffix("\n")


def test_an_exported_model_writes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, hf = tmp_path / "run", tmp_path / "hf"
    write_run(run, "model.mtp=sequential", "model.mtp_heads=2", tokenizer="bpe")
    assert main(["export", str(run), str(hf), "--depths"]) == 0
    texts = []
    for folder in (run, hf):
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt=def f", "--max-tokens=30"]) == 0
        out, err = capsys.readouterr()
        assert "per pass" in err
        texts.append(out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a", "--suffix=b"], "give either --prompt, or --prefix and --suffix"),
        ([], "give either --prompt, or --prefix and --suffix"),
        (["--prompt="], "--prompt must not be empty: a text begins with its own first token\n"),
        (["--prompt=" + "x" * 64], "the prompt must be shorter than the model's context of 64 tokens; got 64"),
        (["--prefix=a"], "need a model that was trained to fill in the middle; "),
        (["--prompt=a", "--max-tokens=0"], "--max-tokens must be at least 1; got 0"),
        (["--prompt=a", "--temperature=-1"], "temperature must be finite and not negative; got -1.0"),
        (["--prompt=a", "--temperature=nan"], "temperature must be finite and not negative; got nan"),
        (["--prompt=a", "--temperature=1", "--top-p=0"], "top_p must be in (0, 1]; got 0.0"),
        (["--prompt=a", "--top-p=0.5", "--seed=1"], "--top-p and --seed must come with a --temperature above 0"),
        (["--prompt=a", "--temperature=1", "--seed=-1"], "--seed must be in [0, 2^63); got -1"),
        (["--prompt=a", "--speculative"], "--speculative needs a model with further heads; "),
        (["--prompt=a", "--device=abacus"], "--device must be usable here; got 'abacus'"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_run(run)
    (run / "model.safetensors").write_bytes(b"not read")
    assert main(["generate", str(run), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llmfast: error: ") and message in err


def test_folders_without_what_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, told in ((tmp_path, "with config.toml"), (tmp_path / "gone", "which does not exist")):
        assert main(["generate", str(folder), "--prompt=a"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "RUN must be the folder of a run" in err and told in err
    run = tmp_path / "run"
    write_run(run, "data.fim_rate=0.5", tokenizer="bpe")
    assert main(["generate", str(tmp_path), "--prompt=a"]) == 2
    assert capsys.readouterr().err.endswith(f"got {tmp_path}; it holds runs: run\n")
    file = run / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|fim_", "<|mif_"), encoding="utf-8")
    assert main(["generate", str(run), "--prefix=a", "--suffix=b"]) == 2
    assert "tokenizer has no <|fim_prefix|>, <|fim_middle|>, <|fim_suffix|>, which FIM needs" in capsys.readouterr().err
    (run / "model.safetensors").unlink()
    assert main(["generate", str(run), "--prompt=a"]) == 2
    assert f"{run} has no weights yet" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_pieces_are_whole_characters_and_make_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = "".join(TEXTS[:3]) + "é中😀👩‍👩‍👧‍👦"
    stream = TextStream(tokenizer, tokenizer.encode("before 中").tolist())
    pieces = [stream.put(token) for token in tokenizer.encode(text).tolist()]
    assert "".join(pieces) == text and all("\ufffd" not in piece for piece in pieces) and stream.rest() == ""
    assert sum(map(bool, pieces)) > 20


def test_broken_characters_do_not_hold_up_what_follows() -> None:
    stream = TextStream(ByteTokenizer(), [])
    assert stream.put(0xE4) == stream.put(0xB8) == ""
    assert stream.put(ord("a")) == "\ufffda"
    pieces = [stream.put(0xFF) for _ in range(20)]
    assert "".join(pieces).count("\ufffd") >= 8
    stream = TextStream(ByteTokenizer(), [])
    assert stream.put(0xE4) == "" and stream.rest() == "\ufffd" and stream.rest() == ""


def test_without_a_seed_each_text_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    texts = []
    for seed in ([], [], ["--seed=0"], ["--seed=0"]):
        torch.manual_seed(0)  # which has no part in it
        assert main(["generate", str(tmp_path / "run"), "--prompt=a", "--temperature=1", "--max-tokens=30", *seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1] and texts[2] == texts[3]


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Keep what was printed, and end its line."""
    write_run(tmp_path / "run")
    put, calls = TextStream.put, list[int]()

    def interrupted(self: TextStream, token: int) -> str:
        calls.append(token)
        if len(calls) == 3:
            raise KeyboardInterrupt
        put(self, token)
        return "x"

    monkeypatch.setattr(TextStream, "put", interrupted)
    assert main(["generate", str(tmp_path / "run"), "--prompt=abc"]) == 130
    assert capsys.readouterr().out == "xx\n"


def test_numbers_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write 200 tokens at most, greedily, on this device, and draft where the model has heads."""
    given: list[argparse.Namespace] = []
    monkeypatch.setattr(generate, "_generate", given.append)
    assert main(["generate", "run", "--prompt=a"]) == 0
    (args,) = given
    assert (args.max_tokens, args.temperature, args.top_p, args.seed) == (200, 0.0, 1.0, None)
    assert (args.device, args.speculative, args.prompt, args.prefix, args.suffix) == ("auto", None, ["a"], None, None)
    assert generate._device("auto").type == "cpu"


@pytest.mark.parametrize(("count", "left"), [(13, 14), (14, 14), (15, 14)])
def test_the_end_of_the_context_is_told_where_more_was_asked_for(
    count: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tell nothing where the last token that was asked for is also the last of the context, or the text has ended."""
    write_run(tmp_path / "run")
    ends = [False]
    plain = lambda model, opened, prompt, count, sampler: iter([97] * (count - 1) + [256 if ends[0] else 98])  # noqa: E731
    monkeypatch.setattr(generate, "_plain", plain)
    for ends[0] in (False, True):
        assert main(["generate", str(tmp_path / "run"), f"--prompt={'x' * 50}", f"--max-tokens={count}"]) == 0
        out, err = capsys.readouterr()
        assert out == "a" * (min(count, left) - 1) + "b" * (not ends[0]) + "\n"
        assert err.startswith(f"llmfast: {min(count, left) - ends[0]} tokens after the prompt, ")
        assert err.endswith("; stopped at the end of the context of 64\n") is (count > left and not ends[0])


def test_what_was_made_is_told() -> None:
    made = generate._Made()
    made.tokens, made.seconds = 3000, 2.0
    plain = "3000 tokens after the prompt, 1,500 per second"
    assert str(made) == plain
    made.passes = 1200
    assert str(made) == f"{plain}; 2.50 per pass, drafts accepted by head: none made"
    made.guessed.update({0: 8, 1: 4, 2: 2})
    made.accepted.update({0: 6, 2: 1})
    assert str(made).endswith("; 2.50 per pass, drafts accepted by head: 75 %, 0 %, 50 %")


def test_a_piece_waits_for_at_most_seven_tokens() -> None:
    """Hold back what may still become a character; release eight tokens that do not."""

    class Slow(ByteTokenizer):
        def decode(self, ids: object) -> str:
            return "\ufffd" * len(list(ids))  # type: ignore[call-overload]

    stream = TextStream(Slow(), [1] * 20)
    assert [len(stream.put(1)) for _ in range(17)] == [0] * 7 + [8] + [0] * 7 + [8] + [0]
    assert len(stream.rest()) == 1
    assert TextStream(ByteTokenizer(), []).ends_line is False
    for text, ends in (("a\n", True), ("a", False)):
        stream = TextStream(ByteTokenizer(), [])
        for byte in text.encode():
            stream.put(byte)
        assert stream.rest() == "" and stream.ends_line is ends
