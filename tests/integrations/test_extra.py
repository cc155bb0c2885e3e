"""Without the extra: importing llmfast asks for nothing, and who asks for an integration is told what to install."""

import importlib
import subprocess
import sys

import pytest


def test_importing_llmfast_imports_no_transformers() -> None:
    code = "import llmfast, llmfast.integrations, sys; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["transformers", "mtp"])
def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("transformers", "mtp"):
        monkeypatch.delitem(sys.modules, f"llmfast.integrations.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"pip install 'llmfast-torch\[hf\]'"):
        importlib.import_module(f"llmfast.integrations.{name}")
