"""Tests of `model.pretrained` that need no transformers; tests/integrations/test_pretrained.py has the rest."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmfast.cli import main
from llmfast.models.sampling import Sampler
from llmfast.train import pretrained


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "transformers could not be imported; pip install 'llmfast-torch[hf]'"),
        (
            ["model.heads=3"],
            "model.heads must be left out with model.pretrained=there, whose config.json says it; got 3",
        ),
        (["model.mtp_detach=true"], "model.mtp_detach must be left out with model.pretrained=there, whose config.json"),
        (["train.init_from=x"], "train.init_from must be left out with model.pretrained=there, which has weights"),
        (["runs=.", "name=there"], "model.pretrained must be another folder than the run's own; got there"),
    ],
)
def test_refused_before_any_work(
    more: list[str],
    message: str,
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    monkeypatch.setattr("llmfast.train.run.prepare_data", lambda *_: pytest.fail("data was read"))
    rest = [setting for setting in settings if not setting.startswith(("model.", "data.tokenizer"))]
    assert main(["train", *(f"--set={s}" for s in [*rest, "model.pretrained=there", *more])]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"llmfast: error: {message}") and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "runs").exists() and not (tmp_path / "there").exists()


@pytest.mark.parametrize("context", [1, 8])
def test_ids_that_the_tokenizer_does_not_know_are_never_generated(context: int) -> None:
    """Models of other libraries may have rows beyond their tokenizer's ids, for the sake of round sizes."""

    class Model:
        def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> None: ...

        def __call__(self, input_ids: Any, **options: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.arange(10.0).expand(1, input_ids.shape[1], 10), past_key_values=None)

    def largest(logits: Any) -> Any:
        return logits.argmax(-1, keepdim=True)

    stream = pretrained._stream(Model(), 7, torch.tensor([1, 2]), context, largest)
    assert [int(next(stream)) for _ in range(3)] == [6, 6, 6]


def test_a_new_token_is_read_alone_until_the_context_is_full() -> None:
    """The last tokens are read again, without a cache, from then on."""
    read: list[tuple[list[int], Any, bool]] = []

    class Model:
        def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> None: ...

        def __call__(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> SimpleNamespace:
            read.append((input_ids[0].tolist(), past_key_values, use_cache))
            logits = torch.zeros(1, input_ids.shape[1], 10)
            logits[0, -1, len(read)] = 1.0
            return SimpleNamespace(logits=logits, past_key_values=f"cache {len(read)}")

    stream = pretrained._stream(Model(), 10, torch.tensor([7, 8]), 3, Sampler())
    assert [int(next(stream)) for _ in range(4)] == [1, 2, 3, 4]
    assert read == [
        ([7, 8], None, True),
        ([1], "cache 1", True),
        ([8, 1, 2], None, False),
        ([1, 2, 3], None, False),
    ]
