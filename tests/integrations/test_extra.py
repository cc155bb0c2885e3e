"""Tests without the extra: importing llmfast needs nothing, and importing an integration names what to install."""

import importlib
import subprocess
import sys

import pytest


def test_importing_llmfast_imports_no_transformers() -> None:
    code = "import llmfast, llmfast.integrations, sys; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


NOTHING_PATCHED = """
import sys, types
import accelerate, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

def library():
    # Every function and class of the modules that are loaded, and what their classes hold.
    held = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("torch", "transformers", "accelerate") and isinstance(module, types.ModuleType):
            for key, value in list(vars(module).items()):
                if callable(value):
                    held[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    held |= {(name, key, k): v for k, v in list(vars(value).items()) if callable(v)}
    return held

def model():
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=2))

ids = torch.arange(8)[None]
transformers.Trainer  # before the first look: the library loads its parts as they are asked for
with torch.autocast("cpu", torch.bfloat16):
    model()(input_ids=ids, labels=ids).loss.backward()
before = library()

import llmfast.integrations.mtp
from llmfast.integrations.transformers import fuse_loss
from llmfast.optim import FusedAdamW

def changed():
    after = library()
    return [key for key, value in before.items() if after.get(key) is not value]

assert len(before) > 10_000
assert not changed(), changed()
fused = fuse_loss(model())
optimizer = FusedAdamW(fused.parameters())
fused(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
llmfast.integrations.mtp.add_mtp(model(), 1)(input_ids=ids, labels=ids).loss.backward()
assert not changed(), changed()
"""


def test_nothing_of_the_libraries_is_patched() -> None:
    for name in ("transformers", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is missing: make test-integrations")
    subprocess.run([sys.executable, "-c", NOTHING_PATCHED], check=True)


@pytest.mark.parametrize("name", ["transformers", "mtp"])
def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("transformers", "mtp"):
        monkeypatch.delitem(sys.modules, f"llmfast.integrations.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"pip install 'llmfast-torch\[hf\]'"):
        importlib.import_module(f"llmfast.integrations.{name}")
